"""Write the documents and packed tokens of one range of ids: a part of the corpus."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moedisco_ray.packed_tokens import Piece
from moedisco_ray.stages.text.packing import pack_part, part_path
from moedisco_ray.stages.text.tokenizer import Encoder

_ROW_GROUP = 4096


class Part(NamedTuple):
    """What was written of one range of ids: training and validation documents, and packed training tokens."""

    train: pa.Table
    validation: pa.Table
    pieces: tuple[Piece, ...]


def write_part(documents: pa.Table, index: int, directory: Path, encoder: Encoder, length: int) -> Part:
    """Write the training part and the validation part of a range of ids, and pack its training tokens.

    A second call writes files with the same bytes.

    Args:
        documents: The documents, in ascending order of id, with the schema `DOCUMENTS`.
        index: Number of the range.
        directory: Parent of `train/`, `validation/` and `shards/`, which are made when absent.
        encoder: The tokenizer.
        length: Sequence length.
    """
    held_out = documents["held_out"]
    # In one chunk, since the layout of a Parquet file's pages depends on the chunks.
    train, validation = (documents.filter(mask).combine_chunks() for mask in (pc.invert(held_out), held_out))
    _write(validation, part_path(directory / "validation", index))
    _write(train, part_path(directory / "train", index))
    shards = directory / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    return Part(train, validation, tuple(pack_part(train, index, shards, encoder, length=length)))


def _write(documents: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each attempt of a task writes its own draft, because two attempts may write at the same time.
    draft = path.with_suffix(f".{uuid.uuid4().hex}")
    pq.write_table(documents, draft, row_group_size=_ROW_GROUP, compression="zstd")
    draft.replace(path)
