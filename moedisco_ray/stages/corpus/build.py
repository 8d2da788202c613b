"""The whole corpus stage. A `MapTasks` runs its tasks: a plain loop here, Ray in `execution.ray.corpus`."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moedisco_ray.core.config import RunConfig, tokenizer_directory
from moedisco_ray.core.records.events import Emit, StageProgress, discard
from moedisco_ray.core.records.findings import corpus_warnings
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_work import on_each
from moedisco_ray.packed_tokens import check_windows, write_index
from moedisco_ray.stages.corpus.buckets import Finished, finish_bucket, list_bucket, sample_texts, survey_bucket
from moedisco_ray.stages.corpus.files import Listing, list_files
from moedisco_ray.stages.corpus.near_duplicates import DROPPED, LISTED, Banding, by_id, by_key, compare_listed
from moedisco_ray.stages.corpus.readers import UNIT_BYTES, Unit, plan_units
from moedisco_ray.stages.corpus.rules import Rules, merged_extremes
from moedisco_ray.stages.corpus.shuffle import Digits, MapTasks, in_this_process, shuffle
from moedisco_ray.stages.corpus.sources import Input, expand_sources
from moedisco_ray.stages.corpus.staging import Bucket, Staged, bucket_count, shuffle_documents, stage_unit
from moedisco_ray.stages.corpus.summary import check_inputs, check_split, left_out, summary_of
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.packing import part_path
from moedisco_ray.stages.text.tokenizer import Encoder, check_vocabulary, save_trained, train_bpe
from moedisco_ray.stages.text.unseen import Skipped

T = TypeVar("T")
R = TypeVar("R")

TOKENIZER_SAMPLE_CHARACTERS = 32 << 20
"""Characters of training text that a new tokenizer is trained on."""


@dataclasses.dataclass(frozen=True)
class Owned:
    """A data owner's part of the corpus.

    Attributes:
        name: The owner.
        store: The owner's storage.
        tokenizer: Directory of the tokenizer, which was trained on text without an owner.
    """

    name: str
    store: RunStore
    tokenizer: Path


def build(
    config: RunConfig,
    directory: Path,
    map_tasks: MapTasks = in_this_process,
    unit_bytes: int = UNIT_BYTES,
    emit: Emit = discard,
    *,
    owned: Owned | None = None,
) -> dict[str, Any]:
    """Make the corpus artifact: documents (`train/`, `validation/`), `tokenizer/`, `shards/` (packed training tokens).

    It holds the text without an owner, or that of one data owner.

    The result does not depend on `map_tasks` and `unit_bytes`. A task holds at most one bucket of documents in memory;
    the caller holds none. More text makes more buckets, not larger ones.

    Args:
        config: The run's configuration.
        directory: An empty directory that every worker can reach.
        map_tasks: Function that runs the tasks.
        unit_bytes: Bytes of text that one reading task gets.
        emit: Receives `stage_progress` events.
        owned: The data owner whose text to read; None: the text without an owner.

    Returns:
        A dictionary with these keys:

        - documents, validation_documents, duplicates, near_duplicates: numbers of documents
        - tokens (packed training tokens), validation_tokens, bytes (of training text), vocab_size
        - sources: for each source's name: documents, tokens, bytes, validation_documents, files, empty_files,
          dropped_rows
        - skipped_files: number of files that `on_error: skip` left out
        - passed_over_files: number of files not read because their folder also holds tables
        - skipped: source, path and reason for the first of these files
        - warnings: sentences about problems of the text

    Raises:
        CorpusError: The text is missing, unreadable or too short.
        ConfigError: The vocabulary does not fit the model, or two sources have the same name.
        CheckpointError: The checkpoint is unreadable, or its vocabulary is too small.
    """
    if owned is None:
        use_tokenizer(config, directory / "tokenizer")
    else:
        shutil.copytree(owned.tokenizer, directory / "tokenizer", ignore=shutil.ignore_patterns(MANIFEST))
    scratch, store = directory / "scratch", RunStore.of(config.location) if owned is None else owned.store
    map_tasks = _carrying_files(map_tasks, store)
    inputs = expand_sources(
        config.corpus.sources,
        scratch / "embedded",
        Limits(config.corpus.sequence_length, config.corpus.document_tokens),
        owner=None if owned is None else owned.name,
        tokenizer=directory / "tokenizer",
    )
    if any(source.tokenizer is not None for source in inputs):
        store.publish(directory / "tokenizer")  # tasks that read conversations need it
    listings = [list_files(source.field, source.settings, own=source.own) for source in inputs]
    sizes = [listing.text_bytes for listing in listings]
    count = bucket_count(sum(sizes))
    stage = functools.partial(stage_unit, directory=scratch / "staged", buckets=count)
    listed = [
        (source.sized(size), listing.files) for source, size, listing in zip(inputs, sizes, listings, strict=True)
    ]
    reading = StageProgress(emit, "corpus", "documents read")
    staged, unreadable = _stage_all(plan_units(listed, unit_bytes), stage, map_tasks, reading)
    skipped = [_skipped(source, listing, unreadable) for source, listing in zip(inputs, listings, strict=True)]
    documents_S, dropped_S = np.zeros(len(inputs), dtype=np.int64), np.zeros(len(inputs), dtype=np.int64)
    for report in staged:
        documents_S[report.order] += report.documents
        dropped_S[report.order] += report.dropped
    check_inputs(inputs, documents_S, dropped_S, skipped)

    rules = Rules(
        tuple(source.name for source in inputs),
        tuple(source.settings.weight for source in inputs),
        config.corpus.validation_fraction,
        config.seed,
        config.corpus.document_tokens,
    )
    buckets = shuffle_documents(staged, scratch / "staged", count, map_tasks=map_tasks)
    if config.corpus.near_duplicates is not None:
        banding = Banding.of(config.corpus.near_duplicates)
        buckets = _find_near_duplicates(
            buckets,
            rules,
            banding,
            documents=sum(report.documents for report in staged),
            directory=scratch / "near",
            map_tasks=map_tasks,
        )
    rules = rules.with_extremes(merged_extremes(map_tasks(functools.partial(survey_bucket, rules=rules), buckets)))
    if owned is None and tokenizer_directory(config) is None:
        sample = sample_texts(map(_fetched(store), buckets), rules, TOKENIZER_SAMPLE_CHARACTERS)
        save_trained(train_bpe(sample, config.tokenizer.train_vocab_size), directory / "tokenizer")
    encoder = Encoder(directory / "tokenizer")
    check_vocabulary(encoder.vocab_size, config.model, "choose a tokenizer with fewer")
    store.publish(directory / "tokenizer")
    finish = on_each(
        store,
        functools.partial(finish_bucket, rules=rules, tokenizer=directory / "tokenizer", directory=directory),
        also=(directory / "tokenizer",),
        writes=functools.partial(_finished_files, directory=directory),
    )
    finished = _finish_all(buckets, finish, map_tasks, StageProgress(emit, "corpus", "documents tokenized"))
    store.remove(scratch)
    train_S3 = np.sum([report.train for report in finished], axis=0)
    validation_S3 = np.sum([report.validation for report in finished], axis=0)
    if owned is None:
        check_split(config, train_S3, validation_S3)

    (directory / "shards").mkdir(exist_ok=True)  # it is missing if other machines have written all pieces
    index = write_index(
        directory / "shards", (piece for report in finished for piece in report.pieces), encoder.vocab_size
    )
    check_windows(index["tokens"], config.corpus.sequence_length)
    summary = summary_of(
        rules.names,
        train_S3,
        validation_S3,
        duplicates=sum(report.duplicates for report in finished),
        near_duplicates=sum(report.near_duplicates for report in finished),
        vocab_size=encoder.vocab_size,
    ) | left_out(inputs, skipped, listings)
    for source, listing in zip(inputs, listings, strict=True):
        read = len(listing.files) - len(unreadable.get(source.order, ()))
        summary["sources"][source.name] |= {
            "files": read,
            "empty_files": listing.empty,
            "dropped_rows": int(dropped_S[source.order]),
        }
    return summary | {"warnings": corpus_warnings(summary)}


def _stage_all(
    units: Sequence[Unit], stage: Callable[[Unit], Staged], map_tasks: MapTasks, progress: StageProgress
) -> tuple[list[Staged], dict[int, dict[str, Skipped]]]:
    """Call `stage` for every unit, and repeat a unit that has unreadable files without these files.

    Returns:
        The result for each unit, and the unreadable files by `Input.order` and path.
    """
    staged: dict[int, Staged] = {}
    skipped: dict[int, dict[str, Skipped]] = {unit.source.order: {} for unit in units}
    waiting = units
    while waiting:
        reports = []
        for report in map_tasks(stage, waiting):
            progress.add(report.documents)
            reports.append(report)
        for report in sorted(reports, key=lambda report: report.index):
            staged[report.index] = report
            for each in report.skipped:  # if a file has several slices, the first slice's reason is kept
                skipped[report.order].setdefault(each.path, each)
        shortened = [unit.without(skipped[unit.source.order].keys()) for unit in units]
        waiting = [unit for unit, before in zip(shortened, units, strict=True) if unit != before]
        units = shortened
    return list(staged.values()), skipped


def _find_near_duplicates(
    buckets: Sequence[Bucket], rules: Rules, banding: Banding, *, documents: int, directory: Path, map_tasks: MapTasks
) -> list[Bucket]:
    """Find near duplicates among all documents; return each bucket with the ids of those that it has to drop."""
    count = banding.key_buckets(documents)
    listing = functools.partial(
        list_bucket, rules=rules, banding=banding, key_buckets=count, directory=directory / "listed"
    )
    listed = shuffle(
        map_tasks(listing, buckets), directory / "listed", LISTED, by_key(count), Digits.of(count), map_tasks=map_tasks
    )
    compare = functools.partial(compare_listed, banding=banding, buckets=len(buckets), directory=directory / "dropped")
    dropped = shuffle(
        map_tasks(compare, listed),
        directory / "dropped",
        DROPPED,
        by_id(len(buckets)),
        Digits.of(len(buckets)),
        map_tasks=map_tasks,
    )
    return [dataclasses.replace(bucket, dropped=found) for bucket, found in zip(buckets, dropped, strict=True)]


def _finish_all(
    buckets: Sequence[Bucket], finish: Callable[[Bucket], Finished], map_tasks: MapTasks, progress: StageProgress
) -> list[Finished]:
    finished = []
    for report in map_tasks(finish, buckets):
        progress.add(int(report.train[:, 0].sum() + report.validation[:, 0].sum()))
        finished.append(report)
    return finished


def _skipped(source: Input, listing: Listing, unreadable: Mapping[int, Mapping[str, Skipped]]) -> list[Skipped]:
    found = (*listing.skipped, *unreadable.get(source.order, {}).values())
    return sorted(found, key=lambda each: each.path)


def use_tokenizer(config: RunConfig, directory: Path) -> None:
    """Copy the configured tokenizer into place; without one, check that a new vocabulary fits the model."""
    source = tokenizer_directory(config)
    if any(each.has_given_tokens for each in config.corpus.sources):
        from moedisco_ray.stages.text.given_tokens import check_sources  # noqa: PLC0415

        check_sources(config)
    if source is None:
        check_vocabulary(config.tokenizer.train_vocab_size, config.model, "lower tokenizer.train_vocab_size")
        return
    # Importing transformers takes seconds; only this branch needs it.
    from moedisco_ray.stages.text.pretrained import check_tokenizer, prepare_tokenizer  # noqa: PLC0415

    check_tokenizer(config)
    prepare_tokenizer(source, directory)


def _carrying_files(map_tasks: MapTasks, store: RunStore) -> MapTasks:
    """Extend `map_tasks`: each task fetches the files that its item names, and publishes those of its result."""

    def mapped(function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
        # Text that the run itself has written exists on this machine only, so it is read here.
        here = [item for item in items if isinstance(item, Unit) and item.source.own]
        elsewhere = [item for item in items if not (isinstance(item, Unit) and item.source.own)]
        carrying = on_each(store, function)
        yield from map(carrying, here)
        if elsewhere:
            yield from map_tasks(carrying, elsewhere)

    return mapped if store.is_remote else map_tasks


def _fetched(store: RunStore) -> Callable[[Bucket], Bucket]:
    def fetched(bucket: Bucket) -> Bucket:
        store.fetch(*(store.paths_in(bucket) if store.is_remote else ()))
        return bucket

    return fetched


def _finished_files(report: Finished, directory: Path) -> list[Path]:
    parts = [part_path(directory / folder, report.index) for folder in ("train", "validation")]
    return [*parts, *(directory / "shards" / name for piece in report.pieces for name in piece.files)]
