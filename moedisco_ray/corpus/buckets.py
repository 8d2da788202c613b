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

from moedisco_ray.corpus.documents import DOCUMENTS, copies, dedupe_and_sort, id_matrix, is_validation
from moedisco_ray.corpus.packing import part_path
from moedisco_ray.corpus.staging import Bucket, read_bucket
from moedisco_ray.corpus.tokenizer import Encoder

_ROW_GROUP = 4096


@dataclasses.dataclass(frozen=True)
class Rules:
    """What decides over a document.

    Attributes:
        names: Of the inputs, in their order.
        weights: Of the inputs.
        validation_fraction: Expected share of documents held out.
        seed: The run's.
        smallest: As `is_validation`.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    validation_fraction: float
    seed: int
    smallest: float


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


def split_bucket(bucket: Bucket, rules: Rules) -> tuple[pa.Table, pa.Table, int]:
    """Training and validation documents of a bucket (id, order, text, copies; by id), and how many duplicates it had.

    A held-out document counts once, whatever its source's weight.
    """
    staged = read_bucket(bucket)
    table = dedupe_and_sort(staged)
    ids = id_matrix(table)
    times = copies(ids, np.array(rules.weights)[table["order"].to_numpy()])
    held_out = is_validation(ids, rules.validation_fraction, rules.seed, rules.smallest)
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
        _write(train, encoder, rules.names, part_path(directory / "train", bucket.index)),
        _write(validation, encoder, rules.names, part_path(directory / "validation", bucket.index)),
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


def _write(table: pa.Table, encoder: Encoder, names: tuple[str, ...], path: Path) -> NDArray[np.int64]:
    tokens = encoder.encode(table["text"].to_pylist())
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.concatenate([np.empty(0, dtype=np.int32), *tokens])
    order = table["order"].to_numpy()
    finished = pa.table([
        table["id"],
        pa.array(names).take(pa.array(order)),
        table["text"].cast(pa.string()),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
        table["copies"],
    ], schema=DOCUMENTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(finished, path, row_group_size=_ROW_GROUP, compression="zstd")
    packed = (lengths + 1 + (encoder.bos is not None)) * table["copies"].to_numpy()
    figures = [np.ones(len(order)), packed, pc.binary_length(table["text"]).to_numpy()]
    return np.stack([np.bincount(order, values, minlength=len(names)) for values in figures], axis=1).astype(np.int64)
