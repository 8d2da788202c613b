"""Decide whether sub-models stay apart as an ensemble, or the model merged from them is the result of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moedisco_ray.core.limits import LOST_BY_MERGING
from moedisco_ray.core.records.summaries import ApartRecord, ClusterFigures


def keep_apart(
    merged: Sequence[ClusterFigures], apart: Sequence[ClusterFigures], *, count: int, asked: bool = False
) -> ApartRecord:
    """Whether sub-models stay apart: on the text of some cluster, the merged model loses more than `LOST_BY_MERGING`.

    A loss of the merged model that is no number is worse than any, and one of the ensemble never speaks for it.
    Clusters without a validation document do not count; if none has one, the merged model is the result.

    Args:
        merged: Figures of the finished merged model on the validation text of each cluster that has some.
        apart: Figures of the ensemble on the same text.
        count: Number of clusters.
        asked: Whether the configuration asks for sub-models that stay apart, whatever was measured.
    """
    alone = {figures.cluster: figures for figures in apart if figures.loss is not None}
    lost = {
        figures.cluster: _lost(figures.loss, alone[figures.cluster].loss)
        for figures in merged
        if figures.cluster in alone and figures.loss is not None
    }
    unmeasured = [cluster for cluster in range(count) if cluster not in lost]
    if not lost:
        return ApartRecord(kept_apart=asked, asked=asked, limit=LOST_BY_MERGING, unmeasured=unmeasured)
    worst = max(lost, key=lambda cluster: lost[cluster])
    together = next(figures for figures in merged if figures.cluster == worst)
    return ApartRecord(
        kept_apart=asked or lost[worst] > LOST_BY_MERGING,
        asked=asked,
        cluster=worst,
        merged=together.loss,
        apart=alone[worst].loss,
        limit=LOST_BY_MERGING,
        documents=together.documents,
        unmeasured=unmeasured,
    )


def _lost(merged: float | None, apart: float | None) -> float:
    """What the merge costs (nats per token), with a number for losses that are none."""
    if apart is None or not math.isfinite(apart):
        return -math.inf
    return math.inf if merged is None or not math.isfinite(merged) else merged - apart
