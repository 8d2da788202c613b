"""The corpus stage: make documents, a tokenizer and packed tokens. The backend decides where `build` does the work."""

from __future__ import annotations

from moedisco_ray.core.artifacts import Draft
from moedisco_ray.core.records import CorpusSummary
from moedisco_ray.stages.context import Context, warn


def run(context: Context, draft: Draft) -> None:
    """Make the corpus artifact."""
    summary = CorpusSummary.model_validate(context.backend.build_corpus(context.config, draft.path, context.emit))
    draft.summary.update(summary.to_json())
    warn(context, "corpus", summary.warnings)
