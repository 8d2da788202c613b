"""The corpus stage: make documents, a tokenizer and packed tokens. The backend decides where `build` does the work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moedisco_ray.core.records.findings import is_read_often, reading_note
from moedisco_ray.core.records.run_damage import Part
from moedisco_ray.core.records.summaries import CorpusSummary
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.core.store.locations import CORPUS
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.stages.context import Context, DataOwner, warn
from moedisco_ray.stages.corpus.owned import build_owned, repair_owned


def run(context: Context, draft: Draft) -> None:
    """Make the corpus artifact, and the corpora of the data owners in their own storages."""
    figures = context.backend.build_corpus(context.config, draft.path, context.emit)
    owners = {owner.name: _of_owner(context, owner, draft.path / "tokenizer") for owner in context.owners}
    if owners:
        figures |= {
            "owners": owners,
            "left": [
                {"owner": name, "what": "numbers of documents, tokens and bytes", "bytes": len(json.dumps(found))}
                for name, found in owners.items()
            ],
        }
    summary = CorpusSummary.model_validate(figures)
    draft.summary.update(summary.to_json())
    tokens = context.config.tokens.total
    often = summary.tokens > 0 and not owners and is_read_often(tokens, summary.tokens)
    warn(context, "corpus", [*summary.warnings, *([reading_note(tokens, summary.tokens)] if often else [])])


def repair_owners(context: Context) -> Iterator[Part]:
    """Verify the corpora of the data owners on their nodes; those that are damaged are made again with the stage.

    Yields:
        The damaged ones.
    """
    for owner in context.owners:
        damaged = context.call_without_slot(owner.pool, Files(), repair_owned, location=owner.store.location)
        if damaged:
            yield Part("corpus", tuple(damaged), CORPUS, owner=owner.name)


def _of_owner(context: Context, owner: DataOwner, tokenizer: Path) -> dict[str, Any]:
    return context.call_without_slot(
        owner.pool,
        Files([tokenizer]),
        build_owned,
        context.config,
        owner.name,
        location=owner.store.location,
        tokenizer=tokenizer,
        fingerprint=context.fingerprint,
    )
