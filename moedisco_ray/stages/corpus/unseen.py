"""Read a bounded sample of text outside the corpus, to evaluate a model on text that it was not trained on."""

from __future__ import annotations

import heapq
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moedisco_ray.core.config import Source
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.stages.corpus.documents import document_id, part_id
from moedisco_ray.stages.corpus.files import File, list_files
from moedisco_ray.stages.corpus.readers import Slice, read_slice, reason
from moedisco_ray.stages.corpus.sources import Input, expand_sources
from moedisco_ray.stages.corpus.summary import check_rows
from moedisco_ray.stages.corpus.tokens import cut_to_limit
from moedisco_ray.stages.text.cutting import Document, Limits
from moedisco_ray.stages.text.tally import Tally
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.text.unseen import Sample, Skipped, Unseen

_SETTING = "evaluation.sources"
_CHUNK = 64
_SPREAD_CHARACTERS = 8
"""Characters that a spread sample keeps for each token that it may have: more than a token has in most languages."""
_MOST_READ = 1 << 28
"""Maximum number of characters that a spread sample reads of a source."""


def read_unseen(
    sources: Sequence[Source],
    encoder: Encoder,
    max_tokens: int,
    limits: Limits,
    trained_on: Sequence[Path] = (),
    *,
    tokenizer: Path | None = None,
) -> Unseen:
    """Read whole documents of each source, in the order of its files, up to the source's equal share of `max_tokens`.

    If even the first document of a source exceeds the share, only its beginning is taken. The first documents are not a
    uniform sample, but nothing after them is read, so a source may have any size. A document that occurs twice counts
    once, in the first source that has it. With `on_error: skip`, a file that cannot be read contributes nothing.

    Args:
        sources: The sources in `evaluation.sources`.
        encoder: The model's tokenizer.
        max_tokens: Maximum tokens to read from all sources together.
        limits: Limits on the length of documents. With `trained_on` they must be the corpus' limits, because the ids of
            a cut document's parts depend on them.
        trained_on: Parquet files of the training documents, with the column id; these documents are left out.
        tokenizer: Directory of the tokenizer, for the sources that need it (`Source.has_given_tokens`).

    Raises:
        CorpusError: A source cannot be read, or all its documents were trained on.
        ConfigError: Two sources have the same name.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs = expand_sources(sources, Path(scratch), limits, _SETTING, "unseen", tokenizer=tokenizer)
        share = max(1, max_tokens // len(inputs))
        found: dict[bytes, Sample] = {}
        skipped: list[Skipped] = []
        for source in inputs:
            samples, left_out, tally = _beginning(source, encoder, share)
            if source.settings.has_given_tokens:
                check_rows(source, tally, len(samples))
            skipped += left_out
            for sample in samples:
                found.setdefault(sample.id, sample)
    known = _ids_in(list(found), trained_on)
    samples = [sample for key, sample in found.items() if key not in known]
    for source in inputs:
        if not any(sample.source == source.name for sample in samples):
            raise CorpusError(
                f"{source.field}.path", source.settings.path, "holds no text that was not trained on; name other text"
            )
    return Unseen(samples, len(known), skipped)


def read_spread(
    path: str, encoder: Encoder, max_tokens: int, limits: Limits, *, tokenizer: Path | None = None
) -> tuple[list[Sample], float]:
    """Read documents spread over a source: those whose ids have the smallest hashes, in the order of the ids.

    So the order of the documents in the source does not matter. The first 256 million characters are read.

    Args:
        path: Path of the source.
        encoder: The model's tokenizer.
        max_tokens: Maximum number of tokens.
        limits: Limits on the length of documents.
        tokenizer: Directory of the tokenizer, for a source that needs it (`Source.has_given_tokens`).

    Returns:
        The documents, and their share of the characters that were read.

    Raises:
        CorpusError: The source cannot be read, or has no text.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs = expand_sources([Source(path=path)], Path(scratch), limits, _SETTING, "unseen", tokenizer=tokenizer)
        documents = itertools.chain.from_iterable(map(_documents, inputs))
        kept, read = _smallest_ids(documents, max_tokens * _SPREAD_CHARACTERS)
        samples, room = list[Sample](), max_tokens
        for sample in _samples(inputs[0], iter(kept), encoder):
            if len(sample.tokens) > room:
                break
            samples.append(sample)
            room -= len(sample.tokens)
    return samples, sum(len(sample.text) for sample in samples) / max(1, read)


def _documents(source: Input) -> Iterator[Document]:
    for file in list_files(source.field, source.settings, own=source.own).files:
        yield from read_slice(source, Slice(file))


def _smallest_ids(documents: Iterator[Document], characters: int) -> tuple[list[Document], int]:
    """Documents with the smallest ids that have a number of characters together; and how many were read."""
    kept, largest_first, held, read = dict[int, Document](), list[int](), 0, 0
    for document in documents:
        read += len(document.text)
        key = -int.from_bytes(document_id(document.text))  # the first of a heap is the smallest
        if key not in kept:
            kept[key] = document
            heapq.heappush(largest_first, key)
            held += len(document.text)
        while held - len(kept[largest_first[0]].text) >= characters:
            held -= len(kept.pop(heapq.heappop(largest_first)).text)
        if read >= _MOST_READ:
            break
    return [kept[key] for key in sorted(kept, reverse=True)], read


def _beginning(source: Input, encoder: Encoder, share: int) -> tuple[list[Sample], list[Skipped], Tally]:
    tally = Tally()
    listing = list_files(source.field, source.settings, own=source.own)
    samples: list[Sample] = []
    skipped = [*listing.skipped, *listing.passed_over]
    room = share
    for file in listing.files:
        try:
            found, full = _read_file(source, file, encoder, room, first=not samples, tally=tally)
        except CorpusError as error:
            if source.settings.on_error == "fail":
                raise
            skipped.append(Skipped(file.path, reason(error)))
            continue
        samples += found
        room -= sum(len(sample.tokens) for sample in found)
        if full:
            break
    return samples, skipped, tally


def _read_file(
    source: Input, file: File, encoder: Encoder, room: int, *, first: bool, tally: Tally
) -> tuple[list[Sample], bool]:
    """The first documents of a file, up to `room` tokens, and whether the next document did not fit.

    With `first`, the file's first document is cut to `room` tokens if it is longer.
    """
    found: list[Sample] = []
    for sample in _samples(source, read_slice(source, Slice(file), tally=tally), encoder):
        if len(sample.tokens) > room:
            if first and not found:
                tokens, mask = sample.tokens[:room], sample.loss_mask
                found.append(
                    sample._replace(
                        text=encoder.decode([tokens])[0], tokens=tokens, loss_mask=None if mask is None else mask[:room]
                    )
                )
            return found, True
        found.append(sample)
        room -= len(sample.tokens)
    return found, False


def _samples(source: Input, documents: Iterator[Document], encoder: Encoder) -> Iterator[Sample]:
    """Tokenize documents; a document with too many tokens is cut as the corpus stage cuts one."""
    while chunk := list(itertools.islice(documents, _CHUNK)):
        encoded = iter(encoder.encode([document.text for document in chunk if document.tokens is None]))
        for document in chunk:
            key = document_id(document.text)
            if document.tokens is not None:
                yield Sample(key, source.name, document.text, document.tokens, document.loss_mask)
                continue
            parts = cut_to_limit(document.text, next(encoded), encoder, source.limits.document_tokens)
            for number, (text, tokens) in enumerate(parts):
                yield Sample(part_id(key, number), source.name, text, tokens, None)


def _ids_in(ids: Sequence[bytes], parts: Sequence[Path]) -> set[bytes]:
    """The given ids that occur in the files, found in one pass over the files."""
    wanted = pa.array(ids, pa.binary(len(ids[0]))) if ids else None
    known: set[bytes] = set()
    for part in parts if ids else ():
        for batch in pq.ParquetFile(part).iter_batches(columns=["id"]):
            column = batch.column(0)
            known.update(column.filter(pc.is_in(column, value_set=wanted)).to_pylist())
    return known
