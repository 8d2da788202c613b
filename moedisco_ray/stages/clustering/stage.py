"""The cluster stage: cluster documents and pack the tokens of each cluster. The backend decides where `build` does the work."""

from __future__ import annotations

from moedisco_ray.core.artifacts import Draft
from moedisco_ray.core.config import CheckpointInit
from moedisco_ray.core.events import Event
from moedisco_ray.core.metering import Meter
from moedisco_ray.core.records import ClusterSummary
from moedisco_ray.stages.context import Context, warn


def run(context: Context, draft: Draft) -> None:
    """Make the cluster artifact; do nothing in a run without sub-models."""
    config = context.config
    if not config.tokens.decoupled:
        return
    init = config.model.init
    model = init.checkpoint if isinstance(init, CheckpointInit) else context.of("seed")
    meter = Meter()

    def metered(event: Event) -> None:
        meter.update(event)
        context.emit(event)

    figures = context.backend.build_clusters(
        config, corpus_dir=context.of("corpus"), model=model, directory=draft.path, emit=metered, stop=context.stop)
    summary = ClusterSummary.model_validate({**figures, "held": meter.worker_seconds})
    draft.summary.update(summary.to_json())
    context.emit(Event("clusters", "cluster", data={
        "documents": [entry.documents for entry in summary.clusters], "tokens": [entry.tokens for entry in summary.clusters]}))
    warn(context, "cluster", summary.warnings)
