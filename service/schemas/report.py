"""Report of a run; `moedisco_ray.core.report` builds it and defines its figures."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moedisco_ray.core.bill import Bill


class ReportPart(BaseModel):
    """Base of a report's parts: frozen; unknown fields of other versions are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)


class StageReport(ReportPart):
    """One finished stage."""

    name: str
    pool: str
    """`low_memory`, `high_memory`, or `head` for the head node."""
    workers: float
    """Parallel workers; the average for a gang."""
    seconds: float
    """Wall-clock time (s)."""
    tokens: int | None
    """Tokens trained on; null if the stage does not train."""
    worker_seconds: float
    """Time summed over workers, including their start-up (s)."""
    dollars: float
    loss: float | None
    """Final training loss (nats per token), averaged over units by tokens."""
    perplexity: float | None
    """Perplexity on validation documents."""
    bits_per_byte: float | None
    """Bits per byte on validation documents."""


class ReportCurve(ReportPart):
    """Loss of a unit against its tokens."""

    stage: str | None
    tokens: list[int]
    loss: list[float]
    """Loss (nats per token)."""


class ReportSample(ReportPart):
    """A text that the finished model generated."""

    prompt: str
    text: str


class ReportStart(ReportPart):
    """Initial weights of the model."""

    kind: str
    """`random`, `checkpoint` or `upcycle`."""
    name: str | None
    """Name of the directory that the weights were read from."""


class RunReport(ReportPart):
    """Cost and results of a run; while it is active, of the stages so far."""

    name: str
    seed: int
    tags: dict[str, str]
    family: str
    """Model family, such as `qwen3_moe`."""
    start: ReportStart | None = None
    stages: list[StageReport]
    """Finished stages, in the pipeline's order."""
    tokens: int
    """Tokens trained on, over all stages."""
    bill: Bill
    rounds: list[dict[str, Any]] = Field(default_factory=list)
    """Synchronisations of the sub-models' backbones: members, and members that were late."""
    corpus: dict[str, Any]
    """Summary of the corpus stage."""
    clusters: dict[str, Any]
    """Clusters of the documents; see `GET .../clusters`."""
    evaluation: dict[str, Any]
    """Perplexity by cluster and by source."""
    merge: dict[str, Any] = Field(default_factory=dict)
    """Summary of the merge stage."""
    samples: list[ReportSample]
    curves: dict[str, ReportCurve]
    """Training loss by unit."""
    held_out: dict[str, ReportCurve] = Field(default_factory=dict)
    """Held-out loss by unit, if the configuration asks for it."""
    versions: dict[str, str]
    """Versions of the packages that the newest stage used."""
