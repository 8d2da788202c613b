"""Finish one bucket (the documents in a range of ids): write its training part, validation part and packed tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moedisco_ray.packed_tokens import Piece
from moedisco_ray.stages.corpus.documents import (
    DOCUMENTS,
    HELD_OUT,
    STAGED,
    TRAINED,
    copies,
    dedupe_and_sort,
    following_ids,
    id_column,
    id_matrix,
    is_validation,
    validation_hash,
)
from moedisco_ray.stages.corpus.near_duplicates import Banding, list_documents, without
from moedisco_ray.stages.corpus.shuffle import Scattered, read_pieces
from moedisco_ray.stages.corpus.staging import Bucket, distinct_documents
from moedisco_ray.stages.text.cutting import Cutter
from moedisco_ray.stages.text.packing import pack_part, part_path
from moedisco_ray.stages.text.tokenizer import Encoder

Tokens = NDArray[np.int32]

_ROW_GROUP = 4096
_HELD_OUT_HASH = -1.0
"""Validation hash of documents that an earlier run held out: below every real hash."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Settings that decide which documents are kept, held out and repeated.

    Attributes:
        names: Name of each input, in order.
        weights: Weight of each input.
        validation_fraction: Expected share of each input's documents that is held out.
        seed: Seed of the run.
        document_tokens: Maximum tokens of a document.
        smallest: Smallest validation hash of each input, from `survey_bucket`; empty before the survey.
        largest: Largest validation hash of each input.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    validation_fraction: float
    seed: int
    document_tokens: int
    smallest: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """Figures of one finished bucket.

    Attributes:
        index: Number of the bucket.
        duplicates: Number of documents that were dropped because they equal another one.
        near_duplicates: Number of documents that were dropped because they are similar to another one.
        train: Training documents, packed tokens (with copies and special tokens), and bytes of text of each of S inputs, [S, 3].
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
    """Smallest and largest validation hash of each of S inputs in a bucket, [S, 2]; infinite for an input without documents."""
    table = distinct_documents(bucket, ("id", "group", "order", "side"))
    groups, order = id_matrix(table, "group"), table["order"].to_numpy()
    wanted = copies(groups, np.array(rules.weights)[order]) > 0
    hashes = _hashes(table, rules)[wanted]
    found = np.full((len(rules.names), 2), [np.inf, -np.inf])
    np.minimum.at(found[:, 0], order[wanted], hashes)
    np.maximum.at(found[:, 1], order[wanted], hashes)
    return found


class Split(NamedTuple):
    """Training and validation documents of a bucket, sorted by id, with the columns of `STAGED` and copies.

    Attributes:
        duplicates: Number of documents that were dropped because they equal another one.
        near_duplicates: Number of documents that were dropped because they are similar to another one.
    """

    train: pa.Table
    validation: pa.Table
    duplicates: int
    near_duplicates: int


def list_bucket(bucket: Bucket, rules: Rules, banding: Banding, key_buckets: int, directory: Path) -> Scattered:
    """Write the lists in which near duplicates of a bucket's documents are searched; see `near_duplicates.list_documents`."""
    table = distinct_documents(bucket)
    wanted = copies(id_matrix(table, "group"), np.array(rules.weights)[table["order"].to_numpy()]) > 0
    path = directory / "buckets" / f"bucket-{bucket.index:06d}"
    return list_documents(bucket.index, table.filter(pa.array(wanted)), banding, key_buckets, path)


def split_bucket(bucket: Bucket, rules: Rules) -> Split:
    """Split a bucket into training and validation documents, and count its duplicates.

    A validation document has one copy, whatever its source's weight. If a source is the corpus of an earlier run, the documents
    that the earlier run held out stay held out. If it held out any, the documents that it trained on stay in training.
    """
    staged = read_pieces(bucket.staged, STAGED)
    unequal = dedupe_and_sort(staged)
    table = without(unequal, bucket.dropped)
    groups, order = id_matrix(table, "group"), table["order"].to_numpy()
    times = copies(groups, np.array(rules.weights)[order])
    smallest = np.array(rules.smallest)[order]
    side = table["side"].to_numpy()
    drawn = is_validation(_hashes(table, rules), rules.validation_fraction, smallest, np.array(rules.largest)[order])
    held_out = (side == HELD_OUT) | (drawn & ~((side == TRAINED) & (smallest == _HELD_OUT_HASH)))
    wanted = times > 0
    times = np.where(held_out, np.minimum(times, 1), times).astype(np.int32)
    table = table.append_column("copies", pa.array(times))
    train, validation = (table.filter(pa.array(wanted & part)) for part in (~held_out, held_out))
    return Split(train, validation, len(staged) - len(unequal), len(unequal) - len(table))


def finish_bucket(bucket: Bucket, rules: Rules, tokenizer: Path, directory: Path) -> Finished:
    """Tokenize a bucket, write its training and validation parts, and pack the training tokens.

    Args:
        bucket: The bucket of staged documents.
        rules: Settings that decide which documents are kept, held out and repeated.
        tokenizer: Directory of a saved tokenizer.
        directory: Parent of `train/`, `validation/` and `shards/`, which are made when absent.
    """
    encoder = Encoder(tokenizer)
    train, validation, duplicates, near_duplicates = split_bucket(bucket, rules)
    held_out, found = _finish(validation, encoder, rules, held_out=True)
    _write(held_out, part_path(directory / "validation", bucket.index))
    trained, figures = _finish(train, encoder, rules, held_out=False)
    _write(trained, part_path(directory / "train", bucket.index))
    shards = directory / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    pieces = pack_part(trained, bucket.index, shards, encoder)
    return Finished(
        bucket.index, duplicates, near_duplicates, train=figures, validation=found, pieces=tuple(pieces))


def sample_texts(buckets: Iterable[Bucket], rules: Rules, characters: int) -> Iterator[str]:
    """Yield training texts in order of id (a uniform sample) until they hold `characters` characters."""
    held = 0
    for bucket in buckets:
        for batch in split_bucket(bucket, rules).train.select(["text"]).to_batches(max_chunksize=_ROW_GROUP):
            for text in batch.column(0).to_pylist():
                yield text
                held += len(text)
                if held >= characters:
                    return


def cut_to_limit(text: str, tokens: Tokens, encoder: Encoder, limit: int) -> list[tuple[str, Tokens]]:
    """Cut a document into parts of at most `limit` tokens (16 or more) and return each part with its tokens."""
    if len(tokens) <= limit:
        return [(text, tokens)]
    data = text.encode()
    cutter = Cutter(max(4, len(data) * limit // len(tokens) * 2 // 3))
    pieces = [piece.decode() for piece in (*cutter.feed(data), *cutter.finish())]
    texts = [piece.strip("\n") for piece in pieces if not piece.isspace()]
    return [
        part for text, tokens in zip(texts, encoder.encode(texts), strict=True)
        for part in cut_to_limit(text, tokens, encoder, limit)]


def _hashes(table: pa.Table, rules: Rules) -> NDArray[np.float64]:
    """Validation hash of each document; `_HELD_OUT_HASH` if an earlier run held it out."""
    hashes = validation_hash(id_matrix(table, "group"), rules.seed)
    return np.where(table["side"].to_numpy() == HELD_OUT, _HELD_OUT_HASH, hashes)


def _cut_by_tokens(table: pa.Table, encoder: Encoder, limit: int) -> tuple[pa.Table, list[Tokens]]:
    texts = table["text"].to_pylist()
    tokens = _encoded(texts, table["tokens"], encoder)
    if all(len(each) <= limit for each in tokens):
        return table, tokens
    parts = [cut_to_limit(*pair, encoder, limit) for pair in zip(texts, tokens, strict=True)]
    counts = [len(each) for each in parts]
    rows = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    cut = table.take(pa.array(rows))
    ids = id_column(following_ids(id_matrix(cut), numbers).tobytes())
    short = pa.array([text for each in parts for text, _ in each], pa.large_string())
    cut = cut.set_column(cut.schema.get_field_index("id"), "id", ids).set_column(cut.schema.get_field_index("text"), "text", short)
    return cut, [tokens for each in parts for _, tokens in each]


def _encoded(texts: Sequence[str], given: pa.ChunkedArray, encoder: Encoder) -> list[Tokens]:
    """Tokens of each text: the given ones, and where they are null, its encoding."""
    if given.null_count == len(given):
        return encoder.encode(texts)
    encoded = iter(encoder.encode([text for text, ids in zip(texts, given, strict=True) if not ids.is_valid]))
    return [ids.values.to_numpy() if ids.is_valid else next(encoded) for ids in given]


def _finish(table: pa.Table, encoder: Encoder, rules: Rules, *, held_out: bool) -> tuple[pa.Table, NDArray[np.int64]]:
    """Tokenize documents; return them with the schema `DOCUMENTS`, and their figures (see `Finished`)."""
    names = rules.names
    table, tokens = _cut_by_tokens(table, encoder, rules.document_tokens)
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.concatenate([np.empty(0, dtype=np.int32), *tokens])
    packed = lengths + encoder.added
    order = table["order"].to_numpy()
    finished = pa.table([
        table["id"],
        pa.array(names).take(pa.array(order)),
        table["text"].cast(pa.string()),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
        pa.array(packed, pa.int32()),
        table["copies"],
        table["group"],
        pa.array(np.full(len(order), held_out)),
        table["loss_mask"],
    ], schema=DOCUMENTS)
    figures = [np.ones(len(order)), packed * table["copies"].to_numpy(), pc.binary_length(table["text"]).to_numpy()]
    return finished, np.stack([np.bincount(order, values, minlength=len(names)) for values in figures], axis=1).astype(np.int64)


def _write(documents: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(documents, path, row_group_size=_ROW_GROUP, compression="zstd")
