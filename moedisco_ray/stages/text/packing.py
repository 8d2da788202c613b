"""Pack the documents of one part of a corpus into files of packed tokens; each part can be packed in its own task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moedisco_ray.packed_tokens import LossMask, Piece, write_piece
from moedisco_ray.stages.text.tokenizer import Encoder

PACKED_COLUMNS = ["copies", "tokens", "loss_mask"]
"""Columns of a part that packing reads."""


def part_path(directory: Path, index: int) -> Path:
    """File of part number `index` in a directory of documents."""
    return directory / f"part-{index:05d}.parquet"


def pack_part(
    documents: pa.Table, part: int, directory: Path, encoder: Encoder, keep: NDArray[np.bool_] | None = None
) -> list[Piece]:
    """Pack each document of a part as often as its column `copies` says.

    Pass c (0, 1, ...) packs the documents with more than c copies into one file, a piece. Names of pieces sort by pass,
    then by part. So the stream of all pieces contains a whole pass over all parts before a document is repeated.

    Args:
        documents: The part's documents, with the columns `PACKED_COLUMNS`.
        part: Number of the part.
        directory: Directory of the packed tokens; must exist.
        encoder: The tokenizer, for its special tokens and its vocabulary.
        keep: Mask of the documents to pack, for example those of a cluster; None packs all documents.

    Returns:
        The pieces, none of them empty. `packed_tokens.write_index` makes the pieces of all parts one stream.
    """
    copies = documents["copies"].to_numpy()
    if keep is not None:
        copies = np.where(keep, copies, 0)
    pieces: list[Piece] = []
    for above in range(int(copies.max(initial=0))):
        chosen = copies > above
        packed = documents if chosen.all() else documents.filter(pa.array(chosen))
        ids, lengths = token_lists(packed["tokens"])
        name = f"pass-{above:05d}-part-{part:05d}.npy" if above else f"part-{part:05d}.npy"
        pieces.append(
            write_piece(
                directory / name,
                ids,
                lengths,
                eos=encoder.eos,
                bos=encoder.bos,
                vocab_size=encoder.vocab_size,
                mask=loss_mask(packed["loss_mask"], lengths),
            )
        )
    return pieces


def token_lists(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Flatten a column of token lists: the tokens of all documents in a row, and the number of tokens of each."""
    flat: list[NDArray[np.int32]] = []
    lengths: list[NDArray[np.int64]] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        flat.append(chunk.values.to_numpy()[offsets[0] : offsets[-1]])
        lengths.append(np.diff(offsets).astype(np.int64))
    if len(flat) == 1:
        return flat[0], lengths[0]  # a single chunk need not be copied
    return np.concatenate([np.empty(0, dtype=np.int32), *flat]), np.concatenate([np.empty(0, dtype=np.int64), *lengths])


def loss_mask(column: pa.ChunkedArray, lengths: NDArray[np.int64]) -> LossMask | None:
    """The tokens of documents that the loss counts; None if it counts all.

    Of a document with a mask, it does not count the special tokens that packing adds.

    Args:
        column: Loss mask of each document; null if all tokens count.
        lengths: Number of tokens of each document.
    """
    if column.null_count == len(column):
        return None
    masked = column.is_valid().to_numpy()
    ids = np.ones(int(lengths.sum()), dtype=np.bool_)
    ids[np.repeat(masked, lengths)] = np.concatenate(
        [chunk.drop_null().flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    )
    return LossMask(ids, ~masked)
