"""The corpus stage as a pipeline of functions of tables, run by an `Engine`: read, shuffle, survey, tokenize, write.

Rows are brought together once, by ranges of ids: duplicates are then in one table, and each range becomes one part of
the corpus. To find near duplicates, rows are also brought together by keys; see `near_duplicates`. The number of ranges
depends on the size of the text alone, so the corpus does not depend on blocks, processors and machines.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moedisco_ray.core.config import RunConfig, tokenizer_directory
from moedisco_ray.core.records.events import Emit, Event, StageProgress, discard
from moedisco_ray.core.records.findings import corpus_warnings
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.packed_tokens import check_windows, write_index
from moedisco_ray.stages.corpus.documents import range_count
from moedisco_ray.stages.corpus.files import Listing, list_files
from moedisco_ray.stages.corpus.near_duplicates import DROPPED, Banding, id_words
from moedisco_ray.stages.corpus.readers import UNIT_BYTES, plan_units
from moedisco_ray.stages.corpus.reading import Note, ReadUnit, Selection
from moedisco_ray.stages.corpus.rules import Rules
from moedisco_ray.stages.corpus.sources import Input, expand_sources
from moedisco_ray.stages.corpus.steps import (
    SAMPLED,
    SURVEYED,
    FindRepeated,
    ListDocuments,
    Sample,
    Survey,
    Tokenize,
    WriteParts,
    Written,
)
from moedisco_ray.stages.corpus.summary import check_inputs, check_rows, check_split, left_out, summary_of
from moedisco_ray.stages.tables import Engine, Tables, in_process
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.tally import Tally
from moedisco_ray.stages.text.tokenizer import Encoder, check_vocabulary, save_trained, train_bpe
from moedisco_ray.stages.text.unseen import Skipped

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
    engine: Engine | None = None,
    unit_bytes: int = UNIT_BYTES,
    events: Emit = discard,
    *,
    owned: Owned | None = None,
) -> dict[str, Any]:
    """Make the corpus artifact: documents (`train/`, `validation/`), `tokenizer/`, `shards/` (packed training tokens).

    It holds the text without an owner, or that of one data owner. The result does not depend on `engine` and
    `unit_bytes`.

    Args:
        config: The run's configuration.
        directory: An empty directory that every worker can reach.
        engine: Runs the functions of tables; by default, this process.
        unit_bytes: Bytes of text that one reading task gets.
        events: Receives `stage_progress` events, each with the number of documents since the one before; workers on
            any machine call it. `counting` makes totals of them.
        owned: The data owner whose text to read; None: the text without an owner.

    Returns:
        A dictionary with these keys:

        - documents, validation_documents, duplicates, near_duplicates: numbers of documents
        - tokens (packed training tokens), validation_tokens, bytes (of training text), vocab_size
        - sources: for each source's name: documents, tokens, bytes, validation_documents, files, empty_files,
          dropped_rows, skipped_rows, skip_reason, unread_fields
        - skipped_files: number of files that `on_error: skip` left out
        - passed_over_files: number of files not read because their folder also holds tables
        - skipped: source, path and reason for the first of these files
        - cut_conversations, cut_tokens: conversations longer than a sequence, and their tokens that are left out
        - warnings: sentences about problems of the text

    Raises:
        CorpusError: The text is missing, unreadable or too short.
        ConfigError: The vocabulary does not fit the model, or two sources have the same name.
        CheckpointError: The checkpoint is unreadable, or its vocabulary is too small.
    """
    tokenizer = directory / "tokenizer"
    if owned is None:
        _use_tokenizer(config, tokenizer)
    else:
        shutil.copytree(owned.tokenizer, tokenizer, ignore=shutil.ignore_patterns(MANIFEST))
    store = RunStore.of(config.location) if owned is None else owned.store
    sources = _listed(config, directory, owned)
    if any(source.tokenizer is not None for source in sources.inputs):
        store.publish(tokenizer)  # tasks that read conversations need it
    ranges = range_count(sources.text_bytes)
    read = _read(
        sources, engine or in_process(directory / "scratch"), ranges, unit_bytes=unit_bytes, store=store, events=events
    )

    rules = Rules(
        tuple(source.name for source in sources.inputs),
        tuple(source.settings.copies for source in sources.inputs),
        config.corpus.validation_fraction,
        config.seed,
        config.corpus.document_tokens,
    )
    found = _survey(read, rules, sources)
    skipped = _skipped(sources, found)
    for source, tally in zip(sources.inputs, found.tallies, strict=True):
        check_rows(source, tally, int(found.documents_S[source.order]))
    check_inputs(sources.inputs, found.documents_S, found.dropped_S, skipped)
    selection = Selection(found.damaged)
    if config.corpus.near_duplicates is not None:
        banding = Banding.of(config.corpus.near_duplicates)
        repeated = _repeated(read, rules, selection, banding, int(found.documents_S.sum()))
        selection = selection._replace(repeated=repeated)
    surveyed = _survey(read, rules, sources, selection) if selection.repeated is not None else found
    rules = rules.with_extremes(surveyed.extremes_S2)
    if owned is None and tokenizer_directory(config) is None:
        vocab_size = config.tokenizer.train_vocab_size
        _train_tokenizer(
            read, rules, selection, ranges, text_bytes=sources.text_bytes, vocab_size=vocab_size, directory=tokenizer
        )
    encoder = Encoder(tokenizer)
    check_vocabulary(encoder.vocab_size, config.model, "choose a tokenizer with fewer")
    store.publish(tokenizer)
    tokenized = read.map(Tokenize(rules, selection, tokenizer, store))
    written: list[Written] = tokenized.written(
        WriteParts(rules, ranges, config.corpus.sequence_length, directory, tokenizer, store=store, events=events)
    )
    store.remove(directory / "scratch")
    train_S3 = np.sum([part.train for part in written], axis=0)
    validation_S3 = np.sum([part.validation for part in written], axis=0)
    if owned is None:
        check_split(config, train_S3, validation_S3)

    (directory / "shards").mkdir(exist_ok=True)  # it is missing if other machines have written all pieces
    pieces = [piece for part in written for piece in part.pieces]
    index = write_index(directory / "shards", pieces, encoder.vocab_size, config.corpus.sequence_length)
    check_windows(index["tokens"], config.corpus.sequence_length, conversations="conversations" in index)
    distinct, kept = int(found.distinct_S.sum()), int(surveyed.kept_S.sum())
    summary = summary_of(
        rules.names,
        train_S3,
        validation_S3,
        duplicates=int(found.documents_S.sum()) - distinct,
        near_duplicates=distinct - kept,
        vocab_size=encoder.vocab_size,
    ) | left_out(sources.inputs, skipped, sources.listings)
    summary |= {
        "cut_conversations": sum(piece.cut for piece in pieces),
        "cut_tokens": sum(piece.left_out for piece in pieces),
    }
    for source, listing in zip(sources.inputs, sources.listings, strict=True):
        files = len(listing.files) - len(found.reasons.get(source.order, ()))
        summary["sources"][source.name] |= {
            "files": files,
            "empty_files": listing.empty,
            "dropped_rows": int(found.dropped_S[source.order]),
            **found.tallies[source.order].figures(),
        }
    return summary | {"warnings": corpus_warnings(summary)}


def counting(emit: Emit) -> Emit:
    """A receiver of the events of `build` that adds up the documents, and emits the totals."""
    units: dict[str, StageProgress] = {}

    def count(event: Event) -> None:
        unit = event.data["unit"]
        units.setdefault(unit, StageProgress(emit, "corpus", unit)).add(event.data["done"])

    return count


class _Sources(NamedTuple):
    inputs: tuple[Input, ...]
    listings: list[Listing]
    sizes: list[int]

    @property
    def text_bytes(self) -> int:
        return sum(self.sizes)


def _listed(config: RunConfig, directory: Path, owned: Owned | None) -> _Sources:
    inputs = expand_sources(
        config.corpus.sources,
        directory / "scratch" / "embedded",
        Limits(config.corpus.sequence_length, config.corpus.document_tokens),
        owner=None if owned is None else owned.name,
        tokenizer=directory / "tokenizer",
    )
    listings = [list_files(source.field, source.settings, own=source.own) for source in inputs]
    return _Sources(inputs, listings, [listing.text_bytes for listing in listings])


def _read(sources: _Sources, engine: Engine, ranges: int, unit_bytes: int, store: RunStore, events: Emit) -> Tables:
    """Read all documents, and bring them together by ranges of ids."""
    listed = [
        (source.sized(size), listing.files)
        for source, size, listing in zip(sources.inputs, sources.sizes, sources.listings, strict=True)
    ]
    read_unit = ReadUnit(ranges, store, events)
    units = plan_units(listed, unit_bytes)
    # Text that the run itself has written exists on this machine only, so it is read here.
    here = [table for unit in units if store.is_remote and unit.source.own for table in read_unit(unit)]
    elsewhere = [unit for unit in units if not (store.is_remote and unit.source.own)]
    return engine(elsewhere, read_unit, here, sources.text_bytes).grouped(ranges)


class _Surveyed(NamedTuple):
    """What surveys of all tables say: numbers of documents of each input as in `steps.SURVEYED`, and notes.

    Attributes:
        dropped_S: Number of rows that each input's `map` dropped in files that could be read.
        tallies: Counts of each input's rows with conversations, completions or token ids in these files.
        reasons: Why files could not be read, by input and position in its listing.
        damaged: Keys of these files; see `reading.file_keys`.
    """

    documents_S: NDArray[np.int64]
    distinct_S: NDArray[np.int64]
    kept_S: NDArray[np.int64]
    extremes_S2: NDArray[np.float64]
    dropped_S: NDArray[np.int64]
    tallies: Sequence[Tally]
    reasons: Mapping[int, Mapping[int, str]]

    @property
    def damaged(self) -> NDArray[np.int64]:
        keys = [order << 32 | file for order, files in self.reasons.items() for file in files]
        return np.array(sorted(keys), dtype=np.int64)


def _survey(read: Tables, rules: Rules, sources: _Sources, selection: Selection | None = None) -> _Surveyed:
    """Survey the tables; without a selection, leave out the damaged files that the survey finds."""
    table = read.map(Survey(rules, selection or Selection())).collected(SURVEYED)
    found = _added_up(table, len(sources.inputs))
    if selection is not None or not found.reasons:
        return found
    return _survey(read, rules, sources, Selection(found.damaged))


def _added_up(table: pa.Table, inputs: int) -> _Surveyed:
    order = table["order"].to_numpy()
    documents_S, distinct_S, kept_S = (
        np.bincount(order, table[name].to_numpy(), minlength=inputs).astype(np.int64)
        for name in ("documents", "distinct", "kept")
    )
    extremes_S2 = np.full((inputs, 2), [np.inf, -np.inf])
    np.minimum.at(extremes_S2[:, 0], order, table["smallest"].to_numpy())
    np.maximum.at(extremes_S2[:, 1], order, table["largest"].to_numpy())
    notes = [
        (row["order"], row["file"], Note(*json.loads(row["note"])))
        for row in table.filter(table["note"].is_valid()).select(["order", "file", "note"]).to_pylist()
    ]
    reasons: dict[int, dict[int, str]] = {}
    notes.sort(key=lambda each: (each[0], each[1], each[2].start))
    for number, file, note in notes:
        if note.reason is not None:  # of a file with several damaged slices, the first slice's reason is kept
            reasons.setdefault(number, {}).setdefault(file, note.reason)
    dropped_S = np.zeros(inputs, dtype=np.int64)
    tallies = [Tally() for _ in range(inputs)]
    for number, file, note in notes:
        if file not in reasons.get(number, {}):
            dropped_S[number] += note.dropped
            tallies[number].add(Tally(**{**note.tally, "unread": frozenset(note.tally["unread"])}))
    return _Surveyed(
        documents_S, distinct_S, kept_S, extremes_S2, dropped_S=dropped_S, tallies=tallies, reasons=reasons
    )


def _skipped(sources: _Sources, found: _Surveyed) -> list[list[Skipped]]:
    """Files of each input that were not read, in the order of their paths."""
    skipped: list[list[Skipped]] = []
    for source, listing in zip(sources.inputs, sources.listings, strict=True):
        reasons = found.reasons.get(source.order, {}).items()
        damaged = [Skipped(listing.files[file].path, reason) for file, reason in reasons]
        skipped.append(sorted([*listing.skipped, *damaged], key=lambda each: each.path))
    return skipped


def _repeated(read: Tables, rules: Rules, selection: Selection, banding: Banding, documents: int) -> NDArray[np.void]:
    """Ids of all near duplicates."""
    ranges = banding.key_buckets(documents)
    listed = read.map(ListDocuments(rules, selection, banding, ranges)).grouped(ranges)
    return np.unique(id_words(listed.map(FindRepeated(banding)).collected(DROPPED)))


def _use_tokenizer(config: RunConfig, directory: Path) -> None:
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


def _train_tokenizer(
    read: Tables, rules: Rules, selection: Selection, ranges: int, text_bytes: int, vocab_size: int, directory: Path
) -> None:
    """Train a tokenizer on the first training documents by id, and save it."""
    wanted = TOKENIZER_SAMPLE_CHARACTERS
    first = min(ranges, 1 + 2 * ranges * wanted // max(1, text_bytes))
    while True:
        sampled = read.map(Sample(rules, selection, first)).collected(SAMPLED)
        if first >= ranges or sum(map(len, sampled["text"].to_pylist())) >= wanted:
            break
        first = min(ranges, 2 * first)
    texts = sampled.take(pa.array(np.argsort(id_words(sampled), kind="stable")))["text"]
    save_trained(train_bpe(_first_characters((text.as_py() for text in texts), wanted), vocab_size), directory)


def _first_characters(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts until they hold `characters` characters."""
    held = 0
    for text in texts:
        yield text
        held += len(text)
        if held >= characters:
            return
