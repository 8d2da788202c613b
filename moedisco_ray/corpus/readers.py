"""The texts of a slice of a file, one at a time, whatever the format.

Large files are cut into slices that can be read independently: JSON Lines and one-document-per-line text at bytes (a
slice owns the lines that begin in it), Parquet at row groups.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.corpus.files import File
from moedisco_ray.corpus.sources import Input
from moedisco_ray.errors import CorpusError
from moedisco_ray.file_systems import first_line

UNIT_BYTES = 64 << 20
_UNIT_FILES = 4096
_ROWS = 1024
_BUFFER = 1 << 20


@dataclasses.dataclass(frozen=True)
class Slice:
    """Part of a file: bytes [start, stop) of lines, row groups [start, stop) of Parquet; `stop` None is the end."""

    file: File
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one task reads: slices of one input, about `UNIT_BYTES` together."""

    index: int
    source: Input
    slices: tuple[Slice, ...]


def plan_units(listed: Iterable[tuple[Input, Sequence[File]]], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Share the files out to tasks: small files together, large ones in slices."""
    units: list[Unit] = []
    for source, files in listed:
        group: list[Slice] = []
        filled = 0
        for file in files:
            for piece in _slices(source, file, unit_bytes):
                group.append(piece)
                filled += min(file.text_bytes, unit_bytes)
                if filled >= unit_bytes or len(group) >= _UNIT_FILES:
                    units.append(Unit(len(units), source, tuple(group)))
                    group, filled = [], 0
        if group:
            units.append(Unit(len(units), source, tuple(group)))
    return units


def read_unit(unit: Unit) -> Iterator[str]:
    """The documents of a unit, without those that hold only white space.

    Raises:
        CorpusError: A file is binary, damaged or unreadable, or has no such text column.
    """
    for piece in unit.slices:
        try:
            yield from (text for text in _texts(unit.source, piece) if text and not text.isspace())
        except (OSError, pa.ArrowInvalid) as error:
            raise CorpusError(f"{unit.source.field}.path", piece.file.path, f"cannot be read ({first_line(error)})") from error


def _slices(source: Input, file: File, unit_bytes: int) -> list[Slice]:
    by_line = file.format == "jsonl" or (file.format == "text" and source.documents == "line")
    if file.size <= unit_bytes or file.compressed or not (by_line or file.format == "parquet"):
        return [Slice(file)]
    total, step = file.size, unit_bytes
    if file.format == "parquet":
        try:
            with file.file_system().open_input_file(file.path) as stream:
                total = pq.read_metadata(stream).num_row_groups
        except (OSError, pa.ArrowInvalid):
            return [Slice(file)]    # whoever reads it tells the user
        step = max(1, total * unit_bytes // file.size)
    return [Slice(file, start, min(start + step, total)) for start in range(0, total, step)]


def _texts(source: Input, piece: Slice) -> Iterator[str]:
    if piece.file.format == "parquet":
        return _parquet(source, piece)
    if piece.file.format == "arrow":
        return _arrow(source, piece)
    if piece.file.format == "jsonl":
        return _json_lines(source, piece)
    if source.documents == "line":
        return (_decode(source, piece.file, line).strip() for _, line in _lines(piece))
    if source.documents == "paragraph":
        return _paragraphs(source, piece)
    return iter([_decode(source, piece.file, b"".join(line for _, line in _lines(piece)))])


def _lines(piece: Slice) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the slice, each with its offset; the last may reach beyond it."""
    system, path = piece.file.file_system(), piece.file.path
    whole = piece.start == 0 and piece.stop is None
    raw = system.open_input_stream(path, compression="detect") if whole else system.open_input_file(path)
    with raw, io.BufferedReader(raw, _BUFFER) as stream:
        at = piece.start
        if at:
            # The line that holds the byte before the slice began earlier, and belongs to the slice before.
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while piece.stop is None or at < piece.stop:
            line = stream.readline()
            if not line:
                return
            yield at, line
            at += len(line)


def _decode(source: Input, file: File, data: bytes) -> str:
    if b"\0" in data:
        raise CorpusError(f"{source.field}.path", file.path, "is binary, not text; name the text files, as by a glob")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{source.field}.path", file.path,
            f"is not UTF-8 text (byte {error.start} of a document); convert it, or leave it out by a glob") from error
    return text.replace("\r\n", "\n")


def _paragraphs(source: Input, piece: Slice) -> Iterator[str]:
    paragraph: list[bytes] = []
    for _, line in _lines(piece):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield _decode(source, piece.file, b"".join(paragraph)).rstrip("\n")
            paragraph = []
    if paragraph:
        yield _decode(source, piece.file, b"".join(paragraph)).rstrip("\n")


def _json_lines(source: Input, piece: Slice) -> Iterator[str]:
    for at, line in _lines(piece):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(
                f"{source.field}.path", piece.file.path, f"the line at byte {at} is not JSON; write an object per line",
            ) from error
        if not isinstance(row, dict):
            raise CorpusError(f"{source.field}.path", piece.file.path, f"the line at byte {at} is not a JSON object")
        if source.text_column not in row:
            raise _no_column(source, piece.file, row)
        text = row[source.text_column]
        if isinstance(text, str):
            yield _without_surrogates(text)
        elif text is not None:
            raise _no_text(source, piece.file, type(text).__name__)


def _parquet(source: Input, piece: Slice) -> Iterator[str]:
    # Pre-buffering would hold whole row groups of remote files in memory.
    with (
        piece.file.file_system().open_input_file(piece.file.path) as stream,
        pq.ParquetFile(stream, pre_buffer=False) as table,
    ):
        _check_column(source, piece.file, table.schema_arrow)
        stop = table.num_row_groups if piece.stop is None else piece.stop
        groups = list(range(piece.start, stop))
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[source.text_column]):
            yield from _strings(batch.column(0))


def _arrow(source: Input, piece: Slice) -> Iterator[str]:
    with piece.file.file_system().open_input_stream(piece.file.path) as stream, pa.ipc.open_stream(stream) as batches:
        _check_column(source, piece.file, batches.schema)
        column = batches.schema.get_field_index(source.text_column)
        for batch in batches:
            yield from _strings(batch.column(column))


def _strings(column: Any) -> list[str]:
    return [text for text in column.to_pylist() if text is not None]


def _check_column(source: Input, file: File, schema: Any) -> None:
    if source.text_column not in schema.names:
        raise _no_column(source, file, schema.names)
    kind = schema.field(source.text_column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise _no_text(source, file, str(kind))


def _no_column(source: Input, file: File, columns: Iterable[str]) -> CorpusError:
    return CorpusError(
        f"{source.field}.text_column", source.text_column,
        f"{file.path} has no such column; it has {', '.join(columns) or 'none'}")


def _no_text(source: Input, file: File, kind: str) -> CorpusError:
    return CorpusError(
        f"{source.field}.text_column", source.text_column,
        f"the column holds {kind} in {file.path}; name one that holds text")


def _without_surrogates(text: str) -> str:
    # JSON may escape half a surrogate pair, which no UTF-8 file can hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
