"""The results of a comparison as typed records: `compare.json`, and other results' rows from a comparison."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moedisco_ray.core.config import PoolName
from moedisco_ray.core.records.summaries import Record

SCHEMA_VERSION = 1

Budget = Literal["tokens", "dollars", "loss"]
"""Quantity that is equal for an arm and joint training; each arm is trained once for each. The length of a run to equal
`loss` is predicted from the arm's two earlier runs."""
Measured = Literal["finetune", "ensemble"]
"""Model of a run that is the arm's result: the finished model, or the ensemble of its sub-models."""


class PhaseCost(Record):
    """Planned cost of one phase of a run."""

    stage: str
    """Name of the pipeline stage."""
    pool: PoolName
    steps: int | None
    """Training steps of one model; null if nothing is trained."""
    tokens: int
    """Tokens of all models of the phase together: trained on, or read (`accounting.Reads`)."""
    flops: float
    """Operations (FLOPs)."""
    hours: float
    """Wall-clock time (h). All workers of the sub-models vectorise documents; one worker reads everything else."""
    dollars: float


class Point(Record):
    """One measurement of the held-out loss."""

    stage: str
    """Model that was measured: `seed` or `finetune`."""
    tokens: int
    """Tokens trained on so far, by all models of the run."""
    dollars: float
    """Planned dollars for those tokens and for everything read before this model's training began."""
    hours: float
    """Planned wall-clock time for the same (h)."""
    metered_dollars: float
    """Metered dollars so far."""
    metered_hours: float
    """Wall-clock time so far, without the pauses between attempts (h)."""
    loss: float
    """Held-out loss (nats per token)."""


class TunedSettings(Record):
    """Settings that a sweep chose for an arm, and the size of the sweep."""

    batch_tokens: int
    """Tokens per step in the training of the whole MoE."""
    lr: float
    """Learning rate in the training of the whole MoE."""
    schedule: str
    """Schedule of that learning rate."""
    trainings: int
    """Number of slices that were trained."""
    slice_tokens: int
    """Tokens of each slice."""


class Row(Record):
    """Quality and cost of one finished run of an arm."""

    arm: str
    title: str
    """Title of the arm in tables and figures."""
    budget: Budget
    run: str
    """Name of the run directory."""
    recipe: dict[str, Any]
    """Settings that the run was trained with, by dotted path; see `recipe.recipe`."""
    measured: Measured
    tokens: int = Field(gt=0)
    """Training tokens, summed over all models of the run."""
    flops: float
    """Planned operations (FLOPs)."""
    dollars: float
    """Planned dollars."""
    hours: float
    """Planned wall-clock time (h)."""
    phases: tuple[PhaseCost, ...]
    """The planned cost by phase."""
    metered_dollars: float
    worker_seconds: dict[str, float]
    """Metered worker-seconds by pool."""
    loss: float = Field(gt=0, allow_inf_nan=False)
    """Loss on the validation documents (nats per token)."""
    perplexity: float
    bits_per_byte: float | None
    sources: dict[str, float] | None
    """Perplexity by source; null for an ensemble."""
    specialisation: dict[str, float | None] | None
    """Normalised mutual information of a document's `cluster`, or `source`, and its main expert; null for an
    ensemble."""
    dead_experts: int | None
    """Dead experts over all layers; null for an ensemble."""
    unseen: float | None
    """Perplexity on the text of `evaluation.sources`; null without it."""
    curve: tuple[Point, ...]
    """Measurements of the held-out loss; an ensemble's last one is its evaluation."""
    dollars_to_target: float | None = None
    """Planned dollars to joint training's last held-out loss; null if it was not reached."""
    tuned: TunedSettings | None = None
    """Settings that the arm's sweep chose; null without a sweep."""


class Comparison(Record):
    """Content of `compare.json`."""

    schema_version: int = SCHEMA_VERSION
    seed: int
    rows: tuple[Row, ...] = Field(min_length=1)
    """Rows, joint training first."""
    reference: str
    """Name of the arm that all others are compared with."""
    name: str
    """Name of the base configuration."""
    target_loss: float
    """Joint training's last held-out loss (nats per token)."""
