"""Texts in the cells of Arrow columns; a long one is read in pieces, so that Python never holds it as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from moedisco_ray.stages.corpus.streams import CHUNK

Text = str | Iterator[bytes]
"""A text as a string, or a long text as an iterator over pieces of its UTF-8 bytes."""
LONG = 16 << 20
"""Size above which a text is read in pieces (bytes)."""


def strings(column: Any) -> Iterator[Text]:
    """Texts of a column of strings, without nulls."""
    return (text for text in cells(column) if text is not None)


def cells(column: Any) -> Iterator[Text | None]:
    """Texts of a column of strings, and None for nulls."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.nbytes <= LONG:
        yield from column.to_pylist()
        return
    for cell in column:
        buffer = cell.as_buffer() if cell.is_valid else None
        if buffer is None or buffer.size <= LONG:
            yield cell.as_py()
        else:
            yield _slices(memoryview(buffer))


def _slices(data: memoryview) -> Iterator[bytes]:
    return (data[start : start + CHUNK].tobytes() for start in range(0, len(data), CHUNK))
