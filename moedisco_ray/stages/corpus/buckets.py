"""One bucket of staged documents to its part of the finished corpus: train/part-b and validation/part-b."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moedisco_ray.stages.corpus.documents import (
    DOCUMENTS,
    HELD_OUT,
    TRAINED,
    copies,
    dedupe_and_sort,
    following_ids,
    id_column,
    id_matrix,
    is_validation,
    validation_hash,
)
from moedisco_ray.stages.corpus.staging import Bucket, read_bucket
from moedisco_ray.stages.text.cutting import Cutter
from moedisco_ray.stages.text.packing import part_path
from moedisco_ray.stages.text.tokenizer import Encoder

Tokens = NDArray[np.int32]

_ROW_GROUP = 4096
_HELD_OUT_HASH = -1.0


@dataclasses.dataclass(frozen=True)
class Rules:
    """What decides over a document.

    Attributes:
        names: Of the inputs, in their order.
        weights: Of the inputs.
        validation_fraction: Expected share of documents held out, of each input.
        seed: The run's.
        document_tokens: Most tokens of a document.
        smallest: The smallest validation hash of each input, as `survey_bucket`; empty: not known yet.
        largest: The largest validation hash of each input.
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
    """Figures of one bucket, as matrices [S, 3] over the S inputs in their order.

    Attributes:
        index: Of the bucket.
        duplicates: Documents that were there more than once, counted once less.
        train: Per input: documents, packed tokens of a pass (copies and the tokens between documents counted), bytes of
            text.
        validation: The same of the documents held out.
    """

    index: int
    duplicates: int
    train: NDArray[np.int64]
    validation: NDArray[np.int64]


def survey_bucket(bucket: Bucket, rules: Rules) -> NDArray[np.float64]:
    """The smallest and largest validation hash of each input among a bucket's documents, [S, 2]; infinite where there is none."""
    table = dedupe_and_sort(read_bucket(bucket, ("id", "group", "order", "side")))
    groups, order = id_matrix(table, "group"), table["order"].to_numpy()
    wanted = copies(groups, np.array(rules.weights)[order]) > 0
    hashes = _hashes(table, rules)[wanted]
    found = np.full((len(rules.names), 2), [np.inf, -np.inf])
    np.minimum.at(found[:, 0], order[wanted], hashes)
    np.maximum.at(found[:, 1], order[wanted], hashes)
    return found


def split_bucket(bucket: Bucket, rules: Rules) -> tuple[pa.Table, pa.Table, int]:
    """Training and validation documents of a bucket (id, group, order, text, copies; by id), and how many duplicates it had.

    A held-out document counts once, whatever its source's weight. What an earlier run held out stays held out; what it trained on
    stays training text where its source has validation text of that run too.
    """
    staged = read_bucket(bucket)
    table = dedupe_and_sort(staged)
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
    return train, validation, len(staged) - len(table)


def finish_bucket(bucket: Bucket, rules: Rules, tokenizer: Path, directory: Path) -> Finished:
    """Tokenise a bucket and write its parts.

    Args:
        bucket: Where its staged documents lie.
        rules: What is kept, held out, repeated.
        tokenizer: A saved tokeniser.
        directory: Holds `train/` and `validation/`, which are made when absent.
    """
    train, validation, duplicates = split_bucket(bucket, rules)
    encoder = Encoder(tokenizer)
    return Finished(
        bucket.index, duplicates,
        _write(train, encoder, rules, part_path(directory / "train", bucket.index), held_out=False),
        _write(validation, encoder, rules, part_path(directory / "validation", bucket.index), held_out=True),
    )


def sample_texts(buckets: Iterable[Bucket], rules: Rules, characters: int) -> Iterator[str]:
    """Training texts in the order of their ids, which is a uniform sample, until they hold `characters`."""
    held = 0
    for bucket in buckets:
        for batch in split_bucket(bucket, rules)[0].select(["text"]).to_batches(max_chunksize=_ROW_GROUP):
            for text in batch.column(0).to_pylist():
                yield text
                held += len(text)
                if held >= characters:
                    return


def short_enough(text: str, tokens: Tokens, encoder: Encoder, limit: int) -> list[tuple[str, Tokens]]:
    """A document and its tokens, or its parts and theirs where it has more than `limit` tokens, at least 16."""
    if len(tokens) <= limit:
        return [(text, tokens)]
    data = text.encode()
    cutter = Cutter(max(4, len(data) * limit // len(tokens) * 2 // 3))
    pieces = [piece.decode() for piece in (*cutter.feed(data), *cutter.finish())]
    texts = [piece.strip("\n") for piece in pieces if not piece.isspace()]
    return [
        part for text, tokens in zip(texts, encoder.encode(texts), strict=True)
        for part in short_enough(text, tokens, encoder, limit)]


def _hashes(table: pa.Table, rules: Rules) -> NDArray[np.float64]:
    """The validation hash of each document; below all others where an earlier run held it out."""
    hashes = validation_hash(id_matrix(table, "group"), rules.seed)
    return np.where(table["side"].to_numpy() == HELD_OUT, _HELD_OUT_HASH, hashes)


def _cut_by_tokens(table: pa.Table, encoder: Encoder, limit: int) -> tuple[pa.Table, list[Tokens]]:
    texts = table["text"].to_pylist()
    tokens = encoder.encode(texts)
    if all(len(each) <= limit for each in tokens):
        return table, tokens
    parts = [short_enough(*pair, encoder, limit) for pair in zip(texts, tokens, strict=True)]
    counts = [len(each) for each in parts]
    rows = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    cut = table.take(pa.array(rows))
    ids = id_column(following_ids(id_matrix(cut), numbers).tobytes())
    short = pa.array([text for each in parts for text, _ in each], pa.large_string())
    cut = cut.set_column(cut.schema.get_field_index("id"), "id", ids).set_column(cut.schema.get_field_index("text"), "text", short)
    return cut, [tokens for each in parts for _, tokens in each]


def _write(table: pa.Table, encoder: Encoder, rules: Rules, path: Path, *, held_out: bool) -> NDArray[np.int64]:
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
    ], schema=DOCUMENTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(finished, path, row_group_size=_ROW_GROUP, compression="zstd")
    figures = [np.ones(len(order)), packed * table["copies"].to_numpy(), pc.binary_length(table["text"]).to_numpy()]
    return np.stack([np.bincount(order, values, minlength=len(names)) for values in figures], axis=1).astype(np.int64)
