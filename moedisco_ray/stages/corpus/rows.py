"""Read the texts of a named column in JSON Lines, CSV, Parquet and the Arrow files of saved data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from moedisco_ray.stages.corpus.documents import DOCUMENTS
from moedisco_ray.stages.corpus.files import File
from moedisco_ray.stages.corpus.streams import NotTextError, decode, read_lines
from moedisco_ray.stages.text.cutting import Kept

_ROWS = 1024
_TEXT = "text"
_KEPT = ("group", "held_out")
_CSV_BLOCK = 16 << 20
"""Size of the blocks in which CSV is parsed (bytes); pyarrow refuses longer rows."""


class ColumnError(ValueError):
    """A column is missing in a file or holds no text. The message names the file."""


def json_lines(file: File, column: str, start: int, stop: int | None) -> Iterator[str]:
    """Texts of the objects whose lines begin in bytes [start, stop) of the file.

    Raises:
        NotTextError: A line is not UTF-8 or not a JSON object.
        ColumnError: An object lacks the key, or the value is not text.
    """
    for at, line in _whole_lines(file, start, stop):
        try:
            row = json.loads(decode(line, at))
        except NotTextError:
            raise
        except ValueError as error:
            raise NotTextError(f"the line at byte {at} is not JSON; write one object per line") from error
        if not isinstance(row, dict):
            raise NotTextError(f"the line at byte {at} is not a JSON object; write one per line")
        if column not in row:
            raise _no_column(file, row)
        text = row[column]
        if isinstance(text, str):
            yield text if text.isascii() else _without_surrogates(text)
        elif text is not None:
            raise _no_text(file, type(text).__name__)


def comma_separated(file: File, column: str, delimiter: str) -> Iterator[str]:
    """Texts of a column of CSV with a header, read in blocks.

    Raises:
        ColumnError: The file lacks the column.
        pyarrow.ArrowInvalid: The file is damaged or not UTF-8.
    """
    names = _header(file, delimiter)
    if column not in names:
        raise _no_column(file, names)
    with file.file_system().open_input_stream(file.path, compression="detect") as stream, csv.open_csv(
            stream, **_csv_options(delimiter), convert_options=csv.ConvertOptions(
                include_columns=[column], column_types={column: pa.string()})) as batches:
        for batch in batches:
            yield from _strings(batch.column(0))


def parquet(file: File, column: str, start: int, stop: int | None) -> Iterator[tuple[str, Kept | None]]:
    """Texts of row groups [start, stop). If an earlier run wrote the file, each has that run's side of the validation split.

    Raises:
        ColumnError: The file lacks the column, or the column holds no text.
        pyarrow.ArrowInvalid: The file is not Parquet.
    """
    # Pre-buffering would hold whole row groups of remote files in memory.
    with file.file_system().open_input_file(file.path) as stream, pq.ParquetFile(stream, pre_buffer=False) as table:
        _check_column(file, column, table.schema_arrow)
        columns = [column, *(_KEPT if column == _TEXT and _is_ours(table.schema_arrow) else ())]
        groups = list(range(start, table.num_row_groups if stop is None else stop))
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
            texts = batch.column(column).to_pylist()
            kept = _kept(batch) if len(columns) > 1 else [None] * len(texts)
            yield from (pair for pair in zip(texts, kept, strict=True) if pair[0] is not None)


def arrow(file: File, column: str) -> Iterator[str]:
    """Texts of an Arrow stream that `save_to_disk` wrote.

    Raises:
        ColumnError: The file lacks the column, or the column holds no text.
        pyarrow.ArrowInvalid: The file is not an Arrow stream.
    """
    with file.file_system().open_input_stream(file.path) as stream, pa.ipc.open_stream(stream) as batches:
        _check_column(file, column, batches.schema)
        number = batches.schema.get_field_index(column)
        for batch in batches:
            yield from _strings(batch.column(number))


def _whole_lines(file: File, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    parts: list[bytes] = []
    first = 0
    for at, data, ends in read_lines(file, start, stop):
        first = first if parts else at
        parts.append(data)
        if ends:
            line = b"".join(parts)
            parts.clear()
            if line.strip():
                yield first, line
    if line := b"".join(parts).strip():
        yield first, line


def _csv_options(delimiter: str) -> dict[str, Any]:
    # In TSV a quotation mark is text, since a field holds neither tabs nor line ends (IANA's text/tab-separated-values).
    quoted = delimiter != "\t"
    return {
        "read_options": csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),
        "parse_options": csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, double_quote=quoted, newlines_in_values=quoted)}


def _header(file: File, delimiter: str) -> list[str]:
    with file.file_system().open_input_stream(file.path, compression="detect") as stream, csv.open_csv(
            stream, **_csv_options(delimiter)) as batches:
        names: list[str] = batches.schema.names
    return names


def _strings(column: Any) -> list[str]:
    return [text for text in column.to_pylist() if text is not None]


def _is_ours(schema: Any) -> bool:
    """Whether a table has the columns of a run's corpus, whose types may differ if another tool has rewritten it."""
    if not all(name in schema.names for name in DOCUMENTS.names):
        return False
    group = schema.field("group").type
    return pa.types.is_boolean(schema.field("held_out").type) and (
        pa.types.is_fixed_size_binary(group) or pa.types.is_binary(group) or pa.types.is_large_binary(group))


def _kept(batch: Any) -> list[Kept | None]:
    groups = batch.column("group").cast(DOCUMENTS.field("group").type).to_pylist()
    return [
        None if group is None or held_out is None else Kept(group, held_out)
        for group, held_out in zip(groups, batch.column("held_out").to_pylist(), strict=True)]


def _check_column(file: File, column: str, schema: Any) -> None:
    if column not in schema.names:
        raise _no_column(file, schema.names)
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise _no_text(file, str(kind))


def _no_column(file: File, columns: Iterable[str]) -> ColumnError:
    return ColumnError(f"{file.path} has no such column; it has {', '.join(columns) or 'none'}")


def _no_text(file: File, kind: str) -> ColumnError:
    return ColumnError(f"the column holds {kind} in {file.path}; name one that holds text")


def _without_surrogates(text: str) -> str:
    # JSON can escape half a surrogate pair, which UTF-8 cannot encode.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
