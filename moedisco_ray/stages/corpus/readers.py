"""Read the documents of a slice of a file one at a time, in any format.

Large files are cut into slices that can be read independently. JSON Lines and text with one document per line are cut at bytes
(a slice owns the lines that begin in it), Parquet at row groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.locations import first_line
from moedisco_ray.stages.corpus import plain_text, rows
from moedisco_ray.stages.corpus.files import File
from moedisco_ray.stages.corpus.rows import ColumnError, Text
from moedisco_ray.stages.corpus.sources import Input
from moedisco_ray.stages.corpus.streams import NotTextError
from moedisco_ray.stages.text.cutting import Document, GivenTokensError, Kept, cut_document, cut_stream
from moedisco_ray.stages.text.unseen import Skipped

UNIT_BYTES = 64 << 20
"""Target size of the text that one reading task gets (bytes)."""
_UNIT_FILES = 4096
"""Maximum number of files, or slices of files, that one reading task gets."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Part of a file: lines that begin in bytes [start, stop), or row groups [start, stop) of Parquet.

    Attributes:
        start: First byte or row group.
        stop: Byte or row group after the last one; None for the end of the file.
    """

    file: File
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """The slices of one input that one task reads, about `UNIT_BYTES` together."""

    index: int
    source: Input
    slices: tuple[Slice, ...]

    def without(self, paths: Container[str]) -> Unit:
        """A copy of this reading task without the slices of the files at `paths`."""
        return dataclasses.replace(self, slices=tuple(piece for piece in self.slices if piece.file.path not in paths))


def plan_units(listed: Iterable[tuple[Input, Sequence[File]]], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Divide the files of all inputs into units: small files together, large ones in slices."""
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


def read_unit(unit: Unit, skipped: list[Skipped]) -> Iterator[Document]:
    """Yield the documents of a unit, except for those of only white space.

    Args:
        unit: The unit to read.
        skipped: List to which files that cannot be read are appended, if the source says `on_error: skip`. Documents before the
            damage have already been yielded by then, so the caller must read the unit again without the file.

    Raises:
        CorpusError: A file is binary, damaged or unreadable, or lacks the text column.
    """
    for piece in unit.slices:
        try:
            yield from read_slice(unit.source, piece)
        except CorpusError as error:
            if unit.source.settings.on_error == "fail":
                raise
            skipped.append(Skipped(piece.file.path, reason(error)))


def reason(error: CorpusError) -> str:
    """The part of an error's message that says what is wrong with a file, without the remedy."""
    return error.remedy.partition("; ")[0]


def read_slice(source: Input, piece: Slice) -> Iterator[Document]:
    """Yield the documents of a slice of a file, except for those of only white space.

    Raises:
        CorpusError: The file is binary, damaged or unreadable, or lacks the text column.
    """
    path = piece.file.path
    try:
        yield from _documents(source, piece)
    except ColumnError as error:
        raise CorpusError(f"{source.field}.text_column", source.settings.text_column, str(error)) from error
    except GivenTokensError as error:
        setting = "messages_column" if source.settings.messages_column else "ids_column"
        raise CorpusError(f"{source.field}.{setting}", getattr(source.settings, setting), f"{error}, in {path}") from error
    except NotTextError as error:
        raise CorpusError(f"{source.field}.path", path, str(error)) from error
    except (OSError, pa.ArrowInvalid) as error:
        raise CorpusError(f"{source.field}.path", path, f"cannot be read ({first_line(error)})") from error


def _slices(source: Input, file: File, unit_bytes: int) -> list[Slice]:
    by_line = file.format == "jsonl" or (file.format == "text" and source.settings.documents == "line")
    if file.size <= unit_bytes or file.compressed or not (by_line or file.format == "parquet"):
        return [Slice(file)]
    total, step = file.size, unit_bytes
    if file.format == "parquet":
        try:
            with file.file_system().open_input_file(file.path) as stream:
                total = pq.read_metadata(stream).num_row_groups
        except (OSError, pa.ArrowInvalid):
            return [Slice(file)]    # the task that reads the file will meet the same error, and then names the source in it
        step = max(1, total * unit_bytes // file.size)
    return [Slice(file, start, min(start + step, total)) for start in range(0, total, step)]


def _documents(source: Input, piece: Slice) -> Iterator[Document]:
    file, settings, limits = piece.file, source.settings, source.limits
    if (column := settings.list_column) is not None:
        return _given(source, piece, column)
    if file.format == "text":
        if settings.documents == "line":
            return plain_text.lines(file, limits, piece.start, piece.stop)
        read = {"auto": plain_text.running_text, "file": plain_text.whole_files, "paragraph": plain_text.paragraphs}
        return read[settings.documents](file, limits)
    return (
        document if kept is None else document._replace(kept=kept)
        for text, kept in _texts(piece, settings.text_column) for document in _cut(text, limits.part))


def _given(source: Input, piece: Slice, column: str) -> Iterator[Document]:
    """Documents of a column with conversations or token ids."""
    # Importing transformers takes seconds; only sources with such columns need it.
    from moedisco_ray.stages.text.given_tokens import given_tokens  # noqa: PLC0415

    if source.tokenizer is None:
        raise CorpusError("tokenizer.path", None, f"is not set, but {source.settings.path!r} needs the tokenizer of its data")
    made = given_tokens(source.tokenizer)
    read = made.conversation if source.settings.messages_column else made.tokens
    for value in rows.values(piece.file, column, piece.start, piece.stop):
        yield from read(value, source.limits.document_tokens)


def _cut(text: Text, about: int) -> Iterator[Document]:
    if not isinstance(text, str):
        return cut_stream(text, about)
    return cut_document(text, about) if text and not text.isspace() else iter(())


def _texts(piece: Slice, column: str) -> Iterator[tuple[Text, Kept | None]]:
    if piece.file.format == "parquet":
        return rows.parquet(piece.file, column, piece.start, piece.stop)
    return ((text, None) for text in _other_texts(piece, column))


def _other_texts(piece: Slice, column: str) -> Iterator[Text]:
    if piece.file.format == "arrow":
        return rows.arrow(piece.file, column)
    if piece.file.format == "jsonl":
        return rows.json_lines(piece.file, column, piece.start, piece.stop)
    return rows.comma_separated(piece.file, column, "\t" if piece.file.format == "tsv" else ",")
