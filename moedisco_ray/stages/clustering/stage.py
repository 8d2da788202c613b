"""The cluster stage: cluster documents and pack the tokens of each cluster.

The backend decides where `build` does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedisco_ray.core.config import CheckpointInit
from moedisco_ray.core.config.start_files import start_directory, start_with_weights
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.summaries import ClusterSummary, CorpusSummary
from moedisco_ray.core.store.artifacts import Draft, read_json, write_json
from moedisco_ray.stages.clustering.build import reads_model
from moedisco_ray.stages.context import Context, warn


def run(context: Context, draft: Draft) -> None:
    """Make the cluster artifact; do nothing in a run without sub-models."""
    config = context.config
    if not config.tokens.decoupled:
        return
    model = context.of("seed")
    if isinstance(init := config.model.init, CheckpointInit):
        model = start_with_weights(init, context.verifier) if reads_model(config.clusters) else start_directory(init)
    meter = Meter()

    def metered(event: Event) -> None:
        meter.update(event)
        context.emit(event)

    shared = config.clusters.model_copy(update={"count": config.shared_clusters})
    figures = context.backend.build_clusters(
        config.model_copy(update={"clusters": shared}),
        corpus_dir=context.of("corpus"),
        model=model,
        directory=draft.path,
        emit=metered,
        stop=context.stop,
        store=context.store,
    )
    if config.owners:
        _add_owners(context, figures, draft.path / "report.json")
    summary = ClusterSummary.model_validate({**figures, "held": meter.worker_seconds})
    draft.summary.update(summary.to_json())
    context.emit(
        Event(
            "clusters",
            "cluster",
            data={
                "documents": [entry.documents for entry in summary.clusters],
                "tokens": [entry.tokens for entry in summary.clusters],
            },
        )
    )
    warn(context, "cluster", summary.warnings)


def _add_owners(context: Context, figures: dict[str, Any], path: Path) -> None:
    """Add the data owners' clusters, each of all text of one owner, to the figures and to `report.json`.

    Of the other text, the first documents suffice, up to what the sub-models train on. An owner's text counts in the
    same proportion, so that each sub-model trains in proportion to its part of all text.
    """
    corpus = context.summary("corpus", CorpusSummary)
    clustered, total = sum(entry["tokens"] for entry in figures["clusters"]), corpus.tokens
    sizes = {
        owner: {"documents": text.documents, "tokens": max(1, text.tokens * clustered // total)}
        for owner, text in corpus.owners.items()
    }
    figures["clusters"] = [*figures["clusters"], *sizes.values()]
    report = read_json(path)
    write_json(
        path,
        {**report, "clusters": [*report["clusters"], *({**size, "owner": owner} for owner, size in sizes.items())]},
    )
