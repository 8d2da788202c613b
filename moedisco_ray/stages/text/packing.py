"""Pack documents into files of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moedisco_ray.training.packed_tokens import write_packed

Keep = Callable[[pa.Table, int], NDArray[np.bool_]]
"""Selects documents to pack: takes a part's table (without `text`) and the part's number; returns a mask of the rows."""

_COLUMNS = ["id", "source", "copies", "tokens"]


def part_path(directory: Path, index: int) -> Path:
    """File of part number `index` in a directory of documents."""
    return directory / f"part-{index:05d}.parquet"


def pack(
    parts: Sequence[Path], directory: Path, eos: int, vocab_size: int, *, keep: Keep | None = None, bos: int | None = None,
) -> dict[str, Any]:
    """Pack each document as often as the column `copies` of its table says. Memory is bounded by one part.

    Pass c over all parts, c = 0, 1, ..., packs the documents with more than c copies, in the order of the parts. So the copies of a
    document are a whole pass apart.

    Args:
        parts: Files of documents, in order.
        directory: Directory of the packed tokens.
        eos: End-of-sequence token.
        vocab_size: Vocabulary size of the tokenizer.
        keep: Selection of documents, for example those of a cluster; None selects all documents.
        bos: Token before each document; None for no such token.

    Returns:
        The index of the packed tokens; see `write_packed`.
    """
    most = [_most_copies(path) for path in parts]
    passes = (
        _documents(path, i, c, keep)
        for c in range(max(most, default=0))
        for i, path in enumerate(parts) if most[i] > c
    )
    return write_packed(directory, passes, eos, vocab_size, bos)


def _most_copies(path: Path) -> int:
    column = pq.read_table(path, columns=["copies"])["copies"].to_numpy()
    return int(column.max(initial=0))


def _documents(path: Path, part: int, above: int, keep: Keep | None) -> Iterator[NDArray[np.int32]]:
    table = pq.read_table(path, columns=_COLUMNS)
    chosen = table["copies"].to_numpy() > above
    if keep is not None:
        chosen &= keep(table, part)
    for chunk in table["tokens"].filter(pa.array(chosen)).chunks:
        values = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy()
        for start, stop in itertools.pairwise(offsets):
            yield values[start:stop]
