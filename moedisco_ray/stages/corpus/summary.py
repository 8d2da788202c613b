"""Checks of what was read, and the figures of the corpus stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.stages.corpus.files import Listing
from moedisco_ray.stages.corpus.sources import Input
from moedisco_ray.stages.text.tally import Tally
from moedisco_ray.stages.text.unseen import Skipped

LISTED_FILES = 20
"""Maximum number of unread files that a summary lists by name; its counts include all unread files."""


def check_inputs(
    inputs: Sequence[Input],
    documents_S: NDArray[np.int64],
    dropped_S: NDArray[np.int64],
    skipped: Sequence[Sequence[Skipped]],
) -> None:
    """Check that every input holds documents.

    Args:
        inputs: The S inputs.
        documents_S: Number of documents that were read of each input, with duplicates.
        dropped_S: Number of rows of each input that its source's `map` dropped.
        skipped: Files of each input that were not read.

    Raises:
        CorpusError: An input holds no documents.
    """
    for source, left_out in zip(inputs, skipped, strict=True):
        if not documents_S[source.order]:
            also = (
                f", and {len(left_out)} files were left out, the first since it {left_out[0].reason}"
                if left_out
                else ""
            )
            dropped = dropped_S[source.order]
            also += f", and {source.settings.map} dropped {dropped} rows" if dropped else ""
            raise CorpusError(
                f"{source.field}.path", source.settings.path, f"holds no documents, only white space{also}; add text"
            )


def check_rows(source: Input, tally: Tally, documents: int) -> None:
    """Check that rows with conversations, completions or token ids can be read, and teach the model to end an answer.

    Raises:
        CorpusError: No row could be read, or the loss counts no special token of any row.
    """
    setting, column = next(iter(source.settings.columns.items()))
    field = f"{source.field}.{setting}"
    if tally.skipped and not documents:
        raise CorpusError(field, column, f"{tally.reason}; none of the {tally.skipped:,} rows can be read")
    if tally.masked and not tally.ended:
        raise CorpusError(
            field,
            column,
            "the loss counts no special token of any row, so that the model would not learn to end an answer; let the "
            "chat template end the assistant's turns with one, such as the end-of-sequence token",
        )


def check_split(config: RunConfig, train_S3: NDArray[np.int64], validation_S3: NDArray[np.int64]) -> None:
    """Check that there are enough documents to train on, and some to validate on.

    The figures are those of `tokens.figures`.

    Raises:
        CorpusError: There are too few documents on one side.
    """
    train, held_out = int(train_S3[:, 0].sum()), int(validation_S3[:, 0].sum())
    if train < config.shared_clusters:
        raise CorpusError(
            "clusters.count",
            config.cluster_count,
            f"fewer documents than clusters: {train} for training; add text, lower it, or cut the text into shorter "
            "documents (corpus.sources.*.documents)",
        )
    if held_out == 0:
        # From a source with two or more groups of documents, at least one group is always held out. Nothing is held out
        # here, so every source has a single group.
        sources = tuple(config.corpus.of_owner(None).values())
        raise CorpusError(
            "corpus.sources",
            sources[0].path if len(sources) == 1 else f"{len(sources)} sources",
            f"{'all text is' if len(sources) == 1 else 'the text of each is'} one document or one short passage, "
            f"whose {train} parts stay together, so that nothing can be held out for validation; add documents, or "
            "cut the text differently (corpus.sources.*.documents, corpus.max_document_tokens)",
        )


def summary_of(
    names: Sequence[str],
    train_S3: NDArray[np.int64],
    validation_S3: NDArray[np.int64],
    *,
    duplicates: int,
    near_duplicates: int,
    vocab_size: int,
) -> dict[str, Any]:
    """Figures of the corpus; `build.build` lists the keys.

    Args:
        names: Names of the S inputs.
        train_S3: Figures of the training documents, as in `tokens.figures`.
        validation_S3: Figures of the validation documents.
        duplicates: Number of documents that were dropped because they equal another one.
        near_duplicates: Number of documents that were dropped because they are similar to another one.
        vocab_size: Size of the tokenizer's vocabulary.
    """
    documents, tokens, size = train_S3.sum(axis=0).tolist()
    held_out, held_out_tokens, _ = validation_S3.sum(axis=0).tolist()
    return {
        "documents": documents,
        "validation_documents": held_out,
        "duplicates": duplicates,
        "near_duplicates": near_duplicates,
        "tokens": tokens,
        "validation_tokens": held_out_tokens,
        "bytes": size,
        "vocab_size": vocab_size,
        "sources": {
            name: dict(zip(("documents", "tokens", "bytes"), row, strict=True))
            | {"validation_documents": held_out_row[0]}
            for name, row, held_out_row in zip(names, train_S3.tolist(), validation_S3.tolist(), strict=True)
        },
    }


def left_out(
    inputs: Sequence[Input], skipped: Sequence[Sequence[Skipped]], listings: Sequence[Listing]
) -> dict[str, Any]:
    """Figures of the files that were not read."""
    listed = [
        {"source": source.name, "path": each.path, "reason": each.reason}
        for source, found, listing in zip(inputs, skipped, listings, strict=True)
        for each in (*found, *listing.passed_over)
    ]
    return {
        "skipped_files": sum(map(len, skipped)),
        "passed_over_files": sum(len(listing.passed_over) for listing in listings),
        "skipped": listed[:LISTED_FILES],
    }
