"""Finish one bucket (the documents in a range of ids): write its training part, validation part and packed tokens."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moedisco_ray.packed_tokens import Piece
from moedisco_ray.stages.corpus.documents import STAGED, dedupe_and_sort
from moedisco_ray.stages.corpus.near_duplicates import Banding, list_documents, without
from moedisco_ray.stages.corpus.rules import Rules, extremes, split, times
from moedisco_ray.stages.corpus.shuffle import Scattered, read_pieces
from moedisco_ray.stages.corpus.staging import Bucket, distinct_documents
from moedisco_ray.stages.corpus.tokens import figures, tokenize
from moedisco_ray.stages.text.packing import pack_part, part_path
from moedisco_ray.stages.text.tokenizer import Encoder

_ROW_GROUP = 4096


@dataclasses.dataclass(frozen=True)
class Finished:
    """Figures of one finished bucket.

    Attributes:
        index: Number of the bucket.
        duplicates: Number of documents that were dropped because they equal another one.
        near_duplicates: Number of documents that were dropped because they are similar to another one.
        train: Training documents, packed tokens (with copies and special tokens), and bytes of text of each of S
            inputs, [S, 3].
        validation: The same three figures of the validation documents, [S, 3].
        pieces: Files of packed training tokens.
    """

    index: int
    duplicates: int
    near_duplicates: int
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    pieces: tuple[Piece, ...]


def survey_bucket(bucket: Bucket, rules: Rules) -> NDArray[np.float64]:
    """Smallest and largest validation hash of each of S inputs, [S, 2]; infinite for an input without documents."""
    return extremes(distinct_documents(bucket, ("id", "group", "order", "side")), rules)


class Split(NamedTuple):
    """Documents of a bucket that stay in the corpus, sorted by id, as `rules.split` returns them.

    Attributes:
        duplicates: Number of documents that were dropped because they equal another one.
        near_duplicates: Number of documents that were dropped because they are similar to another one.
    """

    documents: pa.Table
    duplicates: int
    near_duplicates: int


def list_bucket(bucket: Bucket, rules: Rules, banding: Banding, key_buckets: int, directory: Path) -> Scattered:
    """Write the lists in which near duplicates of documents are searched; see `near_duplicates.list_documents`."""
    table = distinct_documents(bucket)
    path = directory / "buckets" / f"bucket-{bucket.index:06d}"
    return list_documents(bucket.index, table.filter(pa.array(times(table, rules) > 0)), banding, key_buckets, path)


def split_bucket(bucket: Bucket, rules: Rules) -> Split:
    """Split a bucket into training and validation documents, and count its duplicates."""
    staged = read_pieces(bucket.staged, STAGED)
    unequal = dedupe_and_sort(staged)
    table = without(unequal, bucket.dropped)
    return Split(split(table, rules), len(staged) - len(unequal), len(unequal) - len(table))


def finish_bucket(bucket: Bucket, rules: Rules, tokenizer: Path, directory: Path) -> Finished:
    """Tokenize a bucket, write its training and validation parts, and pack the training tokens.

    Args:
        bucket: The bucket of staged documents.
        rules: Settings that decide which documents are kept, held out and repeated.
        tokenizer: Directory of a saved tokenizer.
        directory: Parent of `train/`, `validation/` and `shards/`, which are made when absent.
    """
    encoder = Encoder(tokenizer)
    documents, duplicates, near_duplicates = split_bucket(bucket, rules)
    train, validation, pieces = write_part(tokenize(documents, encoder, rules), bucket.index, directory, encoder)
    return Finished(
        bucket.index,
        duplicates,
        near_duplicates,
        train=figures(train, rules),
        validation=figures(validation, rules),
        pieces=pieces,
    )


class Part(NamedTuple):
    """What was written of one range of ids: training and validation documents, and packed training tokens."""

    train: pa.Table
    validation: pa.Table
    pieces: tuple[Piece, ...]


def write_part(documents: pa.Table, index: int, directory: Path, encoder: Encoder) -> Part:
    """Write the training part and the validation part of a range of ids, and pack its training tokens.

    A second call writes files with the same bytes.

    Args:
        documents: The documents, in ascending order of id, with the schema `DOCUMENTS`.
        index: Number of the range.
        directory: Parent of `train/`, `validation/` and `shards/`, which are made when absent.
        encoder: The tokenizer.
    """
    held_out = documents["held_out"]
    # In one chunk, since the layout of a Parquet file's pages depends on the chunks.
    train, validation = (documents.filter(mask).combine_chunks() for mask in (pc.invert(held_out), held_out))
    _write(validation, part_path(directory / "validation", index))
    _write(train, part_path(directory / "train", index))
    shards = directory / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    return Part(train, validation, tuple(pack_part(train, index, shards, encoder)))


def sample_texts(buckets: Iterable[Bucket], rules: Rules, characters: int) -> Iterator[str]:
    """Yield training texts in order of id (a uniform sample) until they hold `characters` characters."""
    texts = itertools.chain.from_iterable(training_texts(split_bucket(bucket, rules).documents) for bucket in buckets)
    return first_characters(texts, characters)


def training_texts(documents: pa.Table) -> Iterator[str]:
    """Texts of the training documents among those that `rules.split` returned."""
    for batch in (
        documents.filter(pc.invert(documents["held_out"])).select(["text"]).to_batches(max_chunksize=_ROW_GROUP)
    ):
        yield from batch.column(0).to_pylist()


def first_characters(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts until they hold `characters` characters."""
    held = 0
    for text in texts:
        yield text
        held += len(text)
        if held >= characters:
            return


def _write(documents: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each attempt of a task writes its own draft, because two attempts may write at the same time.
    draft = path.with_suffix(f".{uuid.uuid4().hex}")
    pq.write_table(documents, draft, row_group_size=_ROW_GROUP, compression="zstd")
    draft.replace(path)
