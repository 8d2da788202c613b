"""Read the texts of a named column, or whole rows, in JSON Lines, CSV, Parquet and the Arrow files of saved data sets.

A text of up to 16 MB is returned as a string. A longer text of a column is returned as an iterator over pieces of its
UTF-8 bytes, so that Python never holds it as a whole. Read such a text before you request the next one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from moedisco_ray.stages.corpus.cells import LONG, Text, cells, strings
from moedisco_ray.stages.corpus.documents import DOCUMENTS
from moedisco_ray.stages.corpus.files import File
from moedisco_ray.stages.corpus.long_json import read_member
from moedisco_ray.stages.corpus.streams import LinePart, NotTextError, decode, read_lines
from moedisco_ray.stages.text.cutting import Kept, without_surrogates

_ROWS = 1024
"""Maximum number of rows that are read at once."""
_ROWS_BYTES = 64 << 20
"""Target size of the rows that are read at once (bytes)."""
_TEXT = "text"
_KEPT = ("group", "held_out")
_MASK = "loss_mask"
_CSV_BLOCK = 16 << 20
"""Size of the blocks in which CSV is parsed (bytes); pyarrow refuses longer rows."""


class ColumnError(ValueError):
    """A column is missing in a file or holds no text. The message names the file.

    Attributes:
        column: Name of the column.
    """

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


def json_lines(file: File, column: str, start: int, stop: int | None) -> Iterator[Text]:
    """Texts of the objects whose lines begin in bytes [start, stop) of the file.

    Raises:
        NotTextError: A line is not UTF-8 or not a JSON object.
        ColumnError: An object lacks the key, or the value is not text.
    """
    for at, line in _lines(file, start, stop):
        if not isinstance(line, bytes):
            yield from _long_text(file, line, column, at)
            continue
        if text := text_of(_object(line, at), column, file.path):
            yield text


def table_rows(
    file: File, columns: Collection[str] | None, start: int, stop: int | None, further: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of a table as Python values, of CSV as text. Each row is held in memory whole.

    Args:
        file: The file.
        columns: Columns to read; None reads all.
        start: First byte or row group, as in `readers.Slice`.
        stop: Byte or row group after the last one; None for the end of the file.
        further: Columns to read where a file has them.

    Raises:
        NotTextError: A line is not UTF-8 or not a JSON object.
        ColumnError: The file is no table or lacks a column.
        pyarrow.ArrowInvalid: The file is damaged.
    """
    if file.format == "text":
        raise ColumnError(next(iter(columns or [_TEXT])), f"{file.path} has no columns; write JSON Lines or Parquet")
    if file.format == "jsonl":
        return _json_rows(file, columns, start, stop, further)
    return (row for batch in _batches(file, columns, start, stop, further) for row in batch.to_pylist())


def value_of(row: Mapping[str, Any], column: str, where: str) -> Any:
    """A row's value in a column.

    Raises:
        ColumnError: The row lacks the column; `where` says which row it is.
    """
    if column not in row:
        raise _no_column(where, column, row)
    return row[column]


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """A row's text in a column; an empty string for null.

    Raises:
        ColumnError: The row lacks the column, or holds no text there; `where` says which row it is.
    """
    text = value_of(row, column, where)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _no_text(where, column, type(text).__name__)
    return without_surrogates(text)


def kept_side(row: Mapping[str, Any], where: str) -> Kept | None:
    """Side of a row in an earlier run's validation split, if that run wrote the row.

    Raises:
        ColumnError: The row is a conversation that the earlier run has rendered.
    """
    group, held_out = (row.get(name) for name in _KEPT)
    if not all(name in row for name in DOCUMENTS.names if name != _MASK):
        return None
    if row.get(_MASK) is not None:
        raise _rendered(where)
    return Kept(group, held_out) if isinstance(group, bytes) and isinstance(held_out, bool) else None


def comma_separated(file: File, column: str) -> Iterator[Text]:
    """Texts of a column of CSV with a header, read in blocks.

    Raises:
        ColumnError: The file lacks the column.
        pyarrow.ArrowInvalid: The file is damaged or not UTF-8.
    """
    return (text for batch in _csv_batches(file, [column]) for text in strings(batch.column(0)))


def parquet(file: File, column: str, start: int, stop: int | None) -> Iterator[tuple[Text, Kept | None]]:
    """Texts of row groups [start, stop).

    If an earlier run wrote the file, each text has its side of that run's validation split.

    Raises:
        ColumnError: The file lacks the column, or the column holds no text.
        pyarrow.ArrowInvalid: The file is not Parquet.
    """
    # Pre-buffering would hold whole row groups of remote files in memory.
    with file.file_system().open_input_file(file.path) as stream, pq.ParquetFile(stream, pre_buffer=False) as table:
        _check_column(file, column, table.schema_arrow)
        ours = (*_KEPT, _MASK) if column == _TEXT and _is_ours(table.schema_arrow) else ()
        columns = [column, *(name for name in ours if name in table.schema_arrow.names)]
        for group in range(start, table.num_row_groups if stop is None else stop):
            rows = _rows_at_once(table.metadata.row_group(group), column)
            for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                _refuse_masks(file, batch)
                kept = _kept(batch) if len(columns) > 1 else [None] * len(batch)
                for text, side in zip(cells(batch.column(column)), kept, strict=True):
                    if text is not None:
                        yield text, side


def arrow(file: File, column: str) -> Iterator[Text]:
    """Texts of an Arrow stream that `save_to_disk` wrote.

    Raises:
        ColumnError: The file lacks the column, or the column holds no text.
        pyarrow.ArrowInvalid: The file is not an Arrow stream.
    """
    with file.file_system().open_input_stream(file.path) as stream, pa.ipc.open_stream(stream) as batches:
        _check_column(file, column, batches.schema)
        number = batches.schema.get_field_index(column)
        for batch in batches:
            yield from strings(batch.column(number))


def _lines(file: File, start: int, stop: int | None) -> Iterator[tuple[int, bytes | Iterator[LinePart]]]:
    """Yield the offset and bytes of each line that is not blank, or its parts if it has more than `LONG` bytes."""
    held: list[LinePart] = []
    parts = read_lines(file, start, stop)
    for part in parts:
        held.append(part)
        if part.ends:
            if line := _joined(held):
                yield held[0].at, line
            held = []
        elif part.at - held[0].at > LONG:
            rest = _rest_of_line(parts)
            yield held[0].at, itertools.chain(held, rest)
            for _ in rest:  # skip what the caller has not read of the line
                pass
            held = []
    if held and (line := _joined(held)):
        yield held[0].at, line


def _object(line: bytes, at: int) -> dict[str, Any]:
    """The JSON object in a line."""
    try:
        row = json.loads(decode(line, at))
    except NotTextError:
        raise
    except (ValueError, RecursionError) as error:
        raise NotTextError(f"the line at byte {at} is not JSON; write one object per line") from error
    if not isinstance(row, dict):
        raise NotTextError(f"the line at byte {at} is not a JSON object; write one per line")
    return row


def _json_rows(
    file: File, columns: Collection[str] | None, start: int, stop: int | None, further: Collection[str]
) -> Iterator[dict[str, Any]]:
    for at, line in _lines(file, start, stop):
        whole = line if isinstance(line, bytes) else b"".join(part.data for part in line)
        row = _object(whole, at)
        if columns is not None:
            others = {column: row[column] for column in further if column in row}
            row = {column: value_of(row, column, file.path) for column in columns} | others
        yield _clean(row) if b"\\u" in whole else row


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_clean(each) for each in value]
    return {key: _clean(each) for key, each in value.items()} if isinstance(value, dict) else value


def _batches(
    file: File, columns: Collection[str] | None, start: int, stop: int | None, further: Collection[str]
) -> Iterator[Any]:
    """Batches of CSV, of Parquet row groups [start, stop) or of a saved data set, with the columns; None means all."""
    if file.format in ("csv", "tsv"):
        yield from _csv_batches(file, columns)
        return
    if file.format == "arrow":
        with file.file_system().open_input_stream(file.path) as stream, pa.ipc.open_stream(stream) as batches:
            chosen = _chosen(file, columns, batches.schema.names, further)
            yield from (batch.select(chosen) for batch in batches)
        return
    with file.file_system().open_input_file(file.path) as stream, pq.ParquetFile(stream, pre_buffer=False) as table:
        chosen = _chosen(file, columns, table.schema_arrow.names, further)
        for number in range(start, table.num_row_groups if stop is None else stop):
            group = table.metadata.row_group(number)
            size = max(1, min(_ROWS, _ROWS_BYTES * group.num_rows // max(1, group.total_byte_size)))
            yield from table.iter_batches(batch_size=size, row_groups=[number], columns=chosen)


def _csv_batches(file: File, columns: Collection[str] | None) -> Iterator[Any]:
    delimiter = "\t" if file.format == "tsv" else ","
    chosen = _chosen(file, columns, _header(file, delimiter))
    convert = csv.ConvertOptions(include_columns=chosen, column_types=dict.fromkeys(chosen, pa.string()))
    with (
        file.file_system().open_input_stream(file.path, compression="detect") as stream,
        csv.open_csv(stream, **_csv_options(delimiter), convert_options=convert) as batches,
    ):
        yield from batches


def _chosen(
    file: File, columns: Collection[str] | None, names: Sequence[str], further: Collection[str] = ()
) -> list[str]:
    """The columns to read of a table with the columns `names`."""
    for column in columns or ():
        if column not in names:
            raise _no_column(file.path, column, names)
    if columns is None:
        return list(names)
    return [*columns, *(name for name in further if name in names and name not in columns)]


def _joined(parts: Sequence[LinePart]) -> bytes:
    line = b"".join(part.data for part in parts)
    return line if line.strip() else b""


def _rest_of_line(parts: Iterator[LinePart]) -> Iterator[LinePart]:
    for part in parts:
        yield part
        if part.ends:
            return


def _long_text(file: File, line: Iterable[LinePart], column: str, at: int) -> Iterator[Text]:
    found = read_member(_characters(line), column, f"the line at byte {at}")
    if not isinstance(found, dict):
        yield (without_surrogates(piece).encode() for piece in found)
    elif column not in found:
        raise _no_column(file.path, column, found)
    elif found[column] != "n":  # first character of `null`
        raise _no_text(file.path, column, {"[": "list", "{": "dict"}.get(found[column], "number"))


def _characters(line: Iterable[LinePart]) -> Iterator[str]:
    """Decode the parts of a line; a character may begin in one part and end in the next."""
    left = b""
    for part in line:
        data = left + part.data
        cut = _whole_characters(data)
        yield decode(data[:cut], part.at - len(left))
        left = data[cut:]
    if left:
        yield decode(left, part.at + len(part.data) - len(left))


def _whole_characters(data: bytes) -> int:
    """Length of the longest prefix of UTF-8 bytes that does not cut a character."""
    for back in range(1, min(4, len(data)) + 1):
        first = data[-back]
        if first & 0xC0 != 0x80:
            needed = 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            return len(data) - back if needed > back else len(data)
    return len(data)


def _csv_options(delimiter: str) -> dict[str, Any]:
    # In TSV a quotation mark is text, since a field holds neither tabs nor line ends (IANA's
    # text/tab-separated-values).
    quoted = delimiter != "\t"
    return {
        "read_options": csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),
        "parse_options": csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, double_quote=quoted, newlines_in_values=quoted
        ),
    }


def _header(file: File, delimiter: str) -> list[str]:
    with (
        file.file_system().open_input_stream(file.path, compression="detect") as stream,
        csv.open_csv(stream, **_csv_options(delimiter)) as batches,
    ):
        names: list[str] = batches.schema.names
    return names


def _rows_at_once(group: Any, column: str) -> int:
    sizes = [
        group.column(i).total_uncompressed_size
        for i in range(group.num_columns)
        if group.column(i).path_in_schema == column
    ]
    return max(1, min(_ROWS, _ROWS_BYTES * group.num_rows // max(1, *sizes, 1)))


def _is_ours(schema: Any) -> bool:
    """Whether a table has the columns of a run's corpus, whose types may differ if another tool has rewritten it."""
    if not all(name in schema.names for name in DOCUMENTS.names if name != _MASK):  # earlier versions had no masks
        return False
    group = schema.field("group").type
    return pa.types.is_boolean(schema.field("held_out").type) and (
        pa.types.is_fixed_size_binary(group) or pa.types.is_binary(group) or pa.types.is_large_binary(group)
    )


def _refuse_masks(file: File, batch: Any) -> None:
    if _MASK in batch.schema.names and batch.column(_MASK).null_count < len(batch):
        raise _rendered(file.path)


def _kept(batch: Any) -> list[Kept | None]:
    groups = batch.column("group").cast(DOCUMENTS.field("group").type).to_pylist()
    return [
        None if group is None or held_out is None else Kept(group, held_out)
        for group, held_out in zip(groups, batch.column("held_out").to_pylist(), strict=True)
    ]


def _check_column(file: File, column: str, schema: Any) -> None:
    if column not in schema.names:
        raise _no_column(file.path, column, schema.names)
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise _no_text(file.path, column, str(kind))


def _no_column(where: str, column: str, columns: Iterable[str]) -> ColumnError:
    return ColumnError(column, f"{where} has no such column; it has {', '.join(columns) or 'none'}")


def _no_text(where: str, column: str, kind: str) -> ColumnError:
    return ColumnError(column, f"the column holds {kind} in {where}; name one that holds text")


def _rendered(where: str) -> ColumnError:
    return ColumnError(
        _TEXT, f"{where} holds conversations that another run has rendered; name the data set that has them"
    )
