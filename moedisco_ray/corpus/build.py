"""The whole corpus stage, over whatever maps functions over tasks: a plain loop here, Ray in `on_ray.corpus`."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from moedisco_ray.config import RunConfig, tokenizer_directory
from moedisco_ray.corpus.buckets import Finished, Rules, finish_bucket, sample_texts
from moedisco_ray.corpus.files import list_files
from moedisco_ray.corpus.packing import pack, part_path
from moedisco_ray.corpus.readers import UNIT_BYTES, plan_units
from moedisco_ray.corpus.sources import Input, expand_sources
from moedisco_ray.corpus.staging import Bucket, Staged, bucket_count, plan_buckets, stage_unit
from moedisco_ray.corpus.tokenizer import Encoder, check_vocabulary, save_trained, train_bpe
from moedisco_ray.errors import CorpusError
from moedisco_ray.tokens import TokenStream

T = TypeVar("T")
R = TypeVar("R")

TOKENIZER_SAMPLE_CHARACTERS = 32 << 20


class MapTasks(Protocol):
    """Applies a picklable function to each item, anywhere, and gives the results in any order."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]: ...  # noqa: D102


def in_this_process(function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """The simplest `MapTasks`: one item after the other."""
    return map(function, items)


def build(
    config: RunConfig, directory: Path, map_tasks: MapTasks = in_this_process, unit_bytes: int = UNIT_BYTES,
) -> dict[str, Any]:
    """Make the corpus artifact: documents (`train/`, `validation/`), `tokenizer/`, `shards/` (packed training tokens).

    The result is the same whatever `map_tasks` and `unit_bytes`. Memory is bounded by one bucket per task and, here, by
    one part, while the number of both grows with the text.

    Args:
        config: The run's configuration.
        directory: An empty directory that every worker sees.
        map_tasks: Runs the tasks.
        unit_bytes: How much text a reading task gets.

    Returns:
        documents, validation_documents, duplicates, tokens (of one pass, as packed), validation_tokens, bytes (of
        training text), vocab_size, and sources: per name its documents, tokens and bytes.

    Raises:
        CorpusError: No text, unreadable text, or too little of it.
        ConfigError: The vocabulary does not fit the model; two sources of one name.
        CheckpointError: The checkpoint is unreadable, or has a smaller vocabulary.
    """
    _use_tokenizer(config, directory / "tokenizer")
    scratch = directory / "scratch"
    inputs = expand_sources(config.corpus.sources, scratch / "embedded")
    listed = [(source, list_files(source.field, source.path, source.format)) for source in inputs]
    count = bucket_count(sum(file.text_bytes for _, files in listed for file in files))
    stage = functools.partial(stage_unit, directory=scratch / "staged", buckets=count, seed=config.seed)
    staged = list(map_tasks(stage, plan_units(listed, unit_bytes)))
    _check_inputs(inputs, staged)

    rules = Rules(
        tuple(source.name for source in inputs), tuple(source.weight for source in inputs),
        config.corpus.validation_fraction, config.seed, min(report.smallest for report in staged))
    buckets = plan_buckets(staged, count)
    encoder = _encoder(config, buckets, rules, directory / "tokenizer")
    finish = functools.partial(finish_bucket, rules=rules, tokenizer=directory / "tokenizer", directory=directory)
    finished = list(map_tasks(finish, buckets))
    shutil.rmtree(scratch)
    _check_split(config, finished)

    parts = [part_path(directory / "train", bucket.index) for bucket in buckets]
    pack(parts, directory / "shards", encoder.eos, encoder.vocab_size, bos=encoder.bos)
    TokenStream([directory / "shards"], config.corpus.sequence_length)  # long enough for one window, or an error
    return _summary(finished, rules.names, encoder.vocab_size)


def _use_tokenizer(config: RunConfig, directory: Path) -> None:
    """Put a tokenizer in its place that was not trained here, or check that one may be trained."""
    source = tokenizer_directory(config)
    if source is None:
        check_vocabulary(config.tokenizer.train_vocab_size, config.model, "lower tokenizer.train_vocab_size")
        return
    # transformers takes seconds to import, in every worker that reads text; a tokenizer from elsewhere alone needs it, here.
    from moedisco_ray.corpus.pretrained import check_tokenizer, prepare_tokenizer  # noqa: PLC0415

    check_tokenizer(config)
    prepare_tokenizer(source, directory)


def _encoder(config: RunConfig, buckets: Sequence[Bucket], rules: Rules, directory: Path) -> Encoder:
    if tokenizer_directory(config) is None:
        sample = sample_texts(buckets, rules, TOKENIZER_SAMPLE_CHARACTERS)
        save_trained(train_bpe(sample, config.tokenizer.train_vocab_size), directory)
    encoder = Encoder(directory)
    check_vocabulary(encoder.vocab_size, config.model, "choose a tokenizer with fewer")
    return encoder


def _check_inputs(inputs: Sequence[Input], staged: Sequence[Staged]) -> None:
    for source in inputs:
        if not sum(report.documents for report in staged if report.order == source.order):
            raise CorpusError(f"{source.field}.path", source.path, "holds no documents, only white space; add text")


def _check_split(config: RunConfig, finished: Sequence[Finished]) -> None:
    train = sum(int(report.train[:, 0].sum()) for report in finished)
    held_out = sum(int(report.validation[:, 0].sum()) for report in finished)
    if train < config.clusters.count:
        raise CorpusError(
            "clusters.count", config.clusters.count,
            f"fewer documents than clusters: {train} for training; add text, lower it, or cut the text finer "
            "(corpus.sources.*.documents)")
    if held_out == 0:
        raise CorpusError(
            "corpus.validation_fraction", config.corpus.validation_fraction,
            f"none of the {train} documents is held out for validation; raise it or add text")


def _summary(finished: Sequence[Finished], names: Sequence[str], vocab_size: int) -> dict[str, Any]:
    train_S3 = np.sum([report.train for report in finished], axis=0)
    validation_S3 = np.sum([report.validation for report in finished], axis=0)
    documents, tokens, size = train_S3.sum(axis=0).tolist()
    held_out, held_out_tokens, _ = validation_S3.sum(axis=0).tolist()
    return {
        "documents": documents,
        "validation_documents": held_out,
        "duplicates": sum(report.duplicates for report in finished),
        "tokens": tokens,
        "validation_tokens": held_out_tokens,
        "bytes": size,
        "vocab_size": vocab_size,
        "sources": {
            name: dict(zip(("documents", "tokens", "bytes"), row, strict=True))
            for name, row in zip(names, train_S3.tolist(), strict=True)
        },
    }
