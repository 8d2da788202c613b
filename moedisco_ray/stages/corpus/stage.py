"""The corpus stage: make documents, a tokenizer and packed tokens. The backend decides where `build` does the work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moedisco_ray.core.records.run_damage import Part
from moedisco_ray.core.records.summaries import CorpusSummary
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.core.store.locations import CORPUS
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.stages.context import Context, warn
from moedisco_ray.stages.corpus.owned import build_owned, repair_owned


def run(context: Context, draft: Draft) -> None:
    """Make the corpus artifact, and the corpora of the data owners in their own storages."""
    figures = context.backend.build_corpus(context.config, draft.path, context.emit)
    owners = {name: _of_owner(context, name, draft.path / "tokenizer") for name in context.config.owners}
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
    warn(context, "corpus", summary.warnings)


def repair_owners(context: Context) -> Iterator[Part]:
    """Verify the corpora of the data owners on their nodes; those that are damaged are made again with the stage.

    Yields:
        The damaged ones.
    """
    for name in context.config.owners:
        damaged = context.call_with_tasks(
            context.config.pools.owner(name),
            Files(),
            repair_owned,
            store=context.owner_store(name),
            location=context.owner_location(name),
        )
        if damaged:
            yield Part("corpus", tuple(damaged), CORPUS, owner=name)


def _of_owner(context: Context, name: str, tokenizer: Path) -> dict[str, Any]:
    return context.call_with_tasks(
        context.config.pools.owner(name),
        Files([tokenizer]),
        build_owned,
        context.config,
        name,
        store=context.owner_store(name),
        location=context.owner_location(name),
        tokenizer=tokenizer,
        fingerprint=context.fingerprint,
    )
