"""Pack the documents of one part of a corpus into files of packed tokens; each part can be packed in its own task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moedisco_ray.packed_tokens import Piece, write_conversations, write_piece
from moedisco_ray.stages.text.tokenizer import Encoder

PACKED_COLUMNS = ["copies", "tokens", "loss_mask"]
"""Columns of a part that packing reads."""


def part_path(directory: Path, index: int) -> Path:
    """File of part number `index` in a directory of documents."""
    return directory / f"part-{index:05d}.parquet"


def pack_part(
    documents: pa.Table,
    part: int,
    directory: Path,
    encoder: Encoder,
    keep: NDArray[np.bool_] | None = None,
    *,
    length: int,
) -> list[Piece]:
    """Pack each document of a part as often as its column `copies` says.

    Pass c (0, 1, ...) packs the documents with more than c copies, running text into one file, a piece, and documents
    with a loss mask into another one, as whole conversations. Names of pieces sort by pass, then by part. So the stream
    of all pieces of running text contains a whole pass over all parts before a document is repeated.

    Args:
        documents: The part's documents, with the columns `PACKED_COLUMNS`.
        part: Number of the part.
        directory: Directory of the packed tokens; must exist.
        encoder: The tokenizer, for its special tokens and its vocabulary.
        keep: Mask of the documents to pack, for example those of a cluster; None packs all documents.
        length: Sequence length.

    Returns:
        The pieces. `packed_tokens.write_index` makes the pieces of all parts one stream.
    """
    copies = documents["copies"].to_numpy()
    if keep is not None:
        copies = np.where(keep, copies, 0)
    whole = documents["loss_mask"].is_valid().to_numpy()
    pieces: list[Piece] = []
    for above in range(int(copies.max(initial=0))):
        name = f"pass-{above:05d}-part-{part:05d}" if above else f"part-{part:05d}"
        running, conversations = (_chosen(documents, (copies > above) & kind) for kind in (~whole, whole))
        if len(running):
            ids, lengths = token_lists(running["tokens"])
            path = directory / f"{name}.npy"
            pieces.append(
                write_piece(path, ids, lengths, eos=encoder.eos, bos=encoder.bos, vocab_size=encoder.vocab_size)
            )
        if len(conversations):
            ids, lengths = token_lists(conversations["tokens"])
            path, mask = directory / f"{name}-conversations.npy", pc.list_flatten(conversations["loss_mask"]).to_numpy()
            pieces.append(
                write_conversations(
                    path, ids, mask, lengths, length=length, bos=encoder.bos, vocab_size=encoder.vocab_size
                )
            )
    return pieces


def _chosen(documents: pa.Table, chosen: NDArray[np.bool_]) -> pa.Table:
    return documents if chosen.all() else documents.filter(pa.array(chosen))


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
