"""Check the beginning of every source, to find in seconds what would otherwise fail a run after hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from moedisco_ray.core.config import RunConfig, Source, tokenizer_directory
from moedisco_ray.core.errors import CorpusError, UserError
from moedisco_ray.core.records.findings import cluster_warnings, corpus_warnings
from moedisco_ray.stages.corpus.files import File, list_files
from moedisco_ray.stages.corpus.readers import Slice, read_slice, reason
from moedisco_ray.stages.corpus.sources import Input
from moedisco_ray.stages.corpus.summary import check_rows
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.tally import Tally
from moedisco_ray.stages.text.unseen import Skipped

_FILES = 8
"""Number of files to read per source, evenly spread over its listing."""
_CHARACTERS = 64 << 10
"""Characters of text to read per file."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Result of checking the beginning of every source.

    Attributes:
        problems: Errors that would fail the run, source by source.
        warnings: Sentences about problems that would make the run's figures uncertain, such as an estimated number of
            documents that is too small.
        sample: First documents of each corpus source, by the source's name. Embedded text and sources with a `map` are
            left out.
        documents: Estimated number of documents of each source in `sample`, by the source's name.
    """

    problems: tuple[UserError, ...]
    warnings: tuple[str, ...]
    sample: dict[str, tuple[str, ...]]
    documents: dict[str, int]


def probe(config: RunConfig) -> Probe:
    """Read the first documents of some files of every source of the corpus and the evaluation.

    This reads at most about half a megabyte of text per source, and only the first rows of a Parquet row group. Of a
    source with a function that changes its rows, only the files are listed: calling the function would run code that
    the user has not read.
    """
    limits = Limits(config.corpus.sequence_length, config.corpus.document_tokens)
    sources = (*config.corpus.sources, *config.evaluation.sources)
    tokenizer = tokenizer_directory(config) if any(source.has_given_tokens for source in sources) else None
    problems: list[UserError] = []
    skipped: list[Skipped] = []
    passed_over: list[Skipped] = []
    sample: dict[str, tuple[str, ...]] = {}
    documents: dict[str, int] = {}
    tallies: dict[str, Tally] = {}
    for source in _inputs("corpus.sources", "source", config.corpus.sources, limits, tokenizer):
        try:
            found = _look_into(source)
        except UserError as error:
            problems.append(error)
        else:
            if source.settings.map is None:
                sample[source.name], documents[source.name] = found.texts, found.documents
            tallies[source.name] = found.tally
            skipped += found.skipped
            passed_over += found.passed_over
    for source in _inputs("evaluation.sources", "unseen", config.evaluation.sources, limits, tokenizer):
        try:
            _look_into(source)
        except UserError as error:
            problems.append(error)
    return Probe(tuple(problems), tuple(_warnings(config, documents, skipped, passed_over, tallies)), sample, documents)


@dataclasses.dataclass(frozen=True)
class _Found:
    texts: tuple[str, ...]
    documents: int
    skipped: tuple[Skipped, ...]
    passed_over: tuple[Skipped, ...]
    tally: Tally


def _inputs(
    setting: str, unnamed: str, sources: Sequence[Source], limits: Limits, tokenizer: Path | None
) -> list[Input]:
    return [
        Input(
            i,
            f"{setting}.{i}",
            source.name or f"{unnamed}-{i}",
            source,
            limits,
            tokenizer=tokenizer if source.has_given_tokens else None,
        )
        for i, source in enumerate(sources)
        if source.path != "embedded" and source.data_owner is None
    ]


def _look_into(source: Input) -> _Found:
    listing = list_files(source.field, source.settings)
    count = len(listing.files)
    if source.settings.map is not None:
        return _Found((), 0, listing.skipped, listing.passed_over, Tally())
    chosen = [listing.files[i * count // _FILES] for i in range(_FILES)] if count > _FILES else list(listing.files)
    texts: list[str] = []
    skipped = list(listing.skipped)
    bytes_read = documents_read = 0
    tally = Tally()
    for file in chosen:
        try:
            first, ended = _first_texts(source, file, tally)
        except CorpusError as error:
            if source.settings.on_error == "fail":
                raise
            skipped.append(Skipped(file.path, reason(error)))
            continue
        texts += first
        bytes_read += file.text_bytes if ended else sum(len(text.encode()) for text in first)
        documents_read += len(first)
    if source.settings.has_given_tokens:
        check_rows(source, tally, len(texts))
    if not texts and len(chosen) == count:
        raise CorpusError(
            f"{source.field}.path", source.settings.path, "holds no documents, only white space; add text"
        )
    documents = documents_read * listing.text_bytes // bytes_read if bytes_read else 0
    return _Found(tuple(texts), documents, tuple(skipped), listing.passed_over, tally)


def _first_texts(source: Input, file: File, tally: Tally) -> tuple[list[str], bool]:
    """The first documents of a file, and whether they are all of its documents."""
    texts: list[str] = []
    documents = read_slice(source, Slice(file), tally=tally)
    held = 0
    for document in documents:
        texts.append(document.text)
        held += len(document.text)
        if held >= _CHARACTERS:
            return texts, next(documents, None) is None
    return texts, True


def _warnings(
    config: RunConfig,
    documents: dict[str, int],
    skipped: Sequence[Skipped],
    passed_over: Sequence[Skipped],
    tallies: Mapping[str, Tally],
) -> list[str]:
    share = config.corpus.validation_fraction
    held_out = {name: max(round(count * share), min(1, count - 1)) for name, count in documents.items()}
    unread = any(source.path == "embedded" or source.map for source in config.corpus.sources if source.owner is None)
    summary = {
        "sources": {
            name: {
                "documents": count - held_out[name],
                "validation_documents": held_out[name],
                **tallies[name].figures(),
            }
            for name, count in documents.items()
            if count
        },
        "validation_documents": sum(held_out.values()),
        "skipped_files": len(skipped),
        "passed_over_files": len(passed_over),
    }
    clusters = config.shared_clusters
    per_cluster = [(sum(documents.values()) - sum(held_out.values())) // clusters] * clusters
    enough = unread or not documents or not config.tokens.decoupled
    return [*corpus_warnings(summary), *([] if enough else cluster_warnings(per_cluster))]
