"""Read the documents of a slice of a file one at a time, in any format.

Large files are cut into slices that can be read independently. JSON Lines and text with one document per line are cut
at bytes (a slice owns the lines that begin in it), Parquet at row groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.stages.corpus import plain_text, rows
from moedisco_ray.stages.corpus.cells import Text
from moedisco_ray.stages.corpus.files import File
from moedisco_ray.stages.corpus.row_map import RowMap
from moedisco_ray.stages.corpus.rows import ColumnError
from moedisco_ray.stages.corpus.sources import Input
from moedisco_ray.stages.corpus.streams import NotTextError
from moedisco_ray.stages.text.cutting import Document, GivenTokensError, Kept, cut_document, cut_stream

UNIT_BYTES = 64 << 20
"""Target size of the text that one reading task gets (bytes)."""
_TEXT = "text"
"""Column of a document of plain text that a source's `map` gets."""
_UNIT_FILES = 4096
"""Maximum number of files, or slices of files, that one reading task gets."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Part of a file: lines that begin in bytes [start, stop), or row groups [start, stop) of Parquet.

    Attributes:
        start: First byte or row group.
        stop: Byte or row group after the last one; None for the end of the file.
        number: Position of the file in the listing of its source.
    """

    file: File
    start: int = 0
    stop: int | None = None
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Unit:
    """The slices of one input that one task reads, about `UNIT_BYTES` together."""

    index: int
    source: Input
    slices: tuple[Slice, ...]


def plan_units(listed: Iterable[tuple[Input, Sequence[File]]], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Divide the files of all inputs into units: small files together, large ones in slices."""
    units: list[Unit] = []
    for source, files in listed:
        group: list[Slice] = []
        filled = 0
        for number, file in enumerate(files):
            for piece in _slices(source, file, unit_bytes):
                group.append(dataclasses.replace(piece, number=number))
                filled += min(file.text_bytes, unit_bytes)
                if filled >= unit_bytes or len(group) >= _UNIT_FILES:
                    units.append(Unit(len(units), source, tuple(group)))
                    group, filled = [], 0
        if group:
            units.append(Unit(len(units), source, tuple(group)))
    return units


def row_map_of(source: Input) -> RowMap | None:
    """The function that changes or drops the rows of a source; None if it has none.

    Raises:
        ConfigError: The function cannot be imported.
    """
    return None if source.settings.map is None else RowMap(source.field, source.settings.map)


def reason(error: CorpusError) -> str:
    """The part of an error's message that says what is wrong with a file, without the remedy."""
    return error.remedy.partition("; ")[0]


def read_slice(source: Input, piece: Slice, row_map: RowMap | None = None) -> Iterator[Document]:
    """Yield the documents of a slice of a file, except for those of only white space.

    Raises:
        CorpusError: The file is binary, damaged or unreadable, or lacks the text column.
        ConfigError: The source's `map` cannot be imported, or fails.
    """
    path, columns = piece.file.path, source.settings.columns
    try:
        yield from _documents(source, piece, row_map_of(source) if row_map is None else row_map)
    except ColumnError as error:
        setting = next((name for name, column in columns.items() if column == error.column), "text_column")
        raise CorpusError(f"{source.field}.{setting}", error.column, str(error)) from error
    except GivenTokensError as error:
        setting, column = next(iter(columns.items()))
        raise CorpusError(f"{source.field}.{setting}", column, f"{error}, in {path}") from error
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
            # the task that reads the file will meet the same error, and then names the source in it
            return [Slice(file)]
        step = max(1, total * unit_bytes // file.size)
    return [Slice(file, start, min(start + step, total)) for start in range(0, total, step)]


def _documents(source: Input, piece: Slice, row_map: RowMap | None) -> Iterator[Document]:
    file, settings, limits = piece.file, source.settings, source.limits
    if settings.has_given_tokens:
        return _given(source, piece, row_map)
    if file.format == "text":
        documents = _plain_text(source, piece)
        return documents if row_map is None else _mapped_documents(documents, row_map, source, file)
    texts = _texts(piece, settings.text_column) if row_map is None else _mapped_texts(source, piece, row_map)
    return (
        document if kept is None else document._replace(kept=kept)
        for text, kept in texts
        for document in _cut(text, limits.part)
    )


def _plain_text(source: Input, piece: Slice) -> Iterator[Document]:
    if source.settings.documents == "line":
        return plain_text.lines(piece.file, source.limits, piece.start, piece.stop)
    read = {"auto": plain_text.running_text, "file": plain_text.whole_files, "paragraph": plain_text.paragraphs}
    return read[source.settings.documents](piece.file, source.limits)


def _mapped_documents(documents: Iterable[Document], row_map: RowMap, source: Input, file: File) -> Iterator[Document]:
    """Change or drop documents of plain text.

    If the first document of a group is dropped, the next one begins the group.
    """
    begins = False
    for document in documents:
        begins = begins or document.begins
        row = row_map({_TEXT: document.text}, file.path)
        for part in () if row is None else _cut(rows.text_of(row, _TEXT, _mapped(source)), source.limits.part):
            yield part._replace(begins=begins)
            begins = False


def _mapped_texts(source: Input, piece: Slice, row_map: RowMap) -> Iterator[tuple[Text, Kept | None]]:
    """Texts of the rows that a source's `map` returns for the rows of a table."""
    for row in rows.table_rows(piece.file, None, piece.start, piece.stop):
        kept = rows.kept_side(row, piece.file.path)  # first, because the function may change the row in place
        if (found := row_map(row, piece.file.path)) is not None:
            yield rows.text_of(found, source.settings.text_column, _mapped(source)), kept


def _mapped(source: Input) -> str:
    return f"a row that {source.settings.map} returns"


def _given(source: Input, piece: Slice, row_map: RowMap | None) -> Iterator[Document]:
    """Documents of columns with conversations, completions or token ids."""
    # Importing transformers takes seconds; only sources with such columns need it.
    from moedisco_ray.stages.text.given_tokens import given_tokens  # noqa: PLC0415

    if source.tokenizer is None:
        raise CorpusError(
            "tokenizer.path", None, f"is not set, but {source.settings.path!r} needs the tokenizer of its data"
        )
    made = given_tokens(source.tokenizer)
    for values in _values(source, piece, row_map):
        first, *others = values
        if first is None:
            continue
        if source.settings.completion_column is not None:
            prompt, *tools = others
            yield from made.completion(prompt, first, *tools)
        elif source.settings.messages_column is not None:
            yield from made.conversation(first, *others)
        else:
            yield from made.tokens(first, source.limits.document_tokens)


def _values(source: Input, piece: Slice, row_map: RowMap | None) -> Iterator[list[Any]]:
    """Values of a source's columns, row by row."""
    columns, path = source.settings.columns.values(), piece.file.path
    for row in rows.table_rows(piece.file, columns if row_map is None else None, piece.start, piece.stop):
        found, where = (row, path) if row_map is None else (row_map(row, path), _mapped(source))
        if found is not None:
            yield [rows.value_of(found, column, where) for column in columns]


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
    return rows.comma_separated(piece.file, column)
