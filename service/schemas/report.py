"""The report of a run; `moedisco_ray.core.report` says what each figure means and makes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moedisco_ray.core.bill import Bill


class ReportPart(BaseModel):
    """Base: frozen. A report is read as an earlier or later version wrote it: what a part does not name stays in it."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)


class StageReport(ReportPart):
    """One finished stage."""

    name: str
    pool: str
    """`low_memory`, `high_memory`, or `head`: the head node."""
    workers: float
    """Workers at once; of a gang on average."""
    seconds: float
    """Wall-clock time."""
    tokens: int | None
    """Tokens trained on; null: the stage trains nothing."""
    worker_seconds: float
    """Seconds summed over workers, their start-up included."""
    dollars: float
    loss: float | None
    """Training loss at the end, in nats per token, weighted by tokens over units."""
    perplexity: float | None
    """On validation documents."""
    bits_per_byte: float | None
    """On validation documents."""


class ReportCurve(ReportPart):
    """Loss of a unit over its tokens."""

    stage: str | None
    tokens: list[int]
    loss: list[float]
    """Nats per token."""


class ReportSample(ReportPart):
    """A text that the finished model wrote."""

    prompt: str
    text: str


class ReportStart(ReportPart):
    """What the model was started from."""

    kind: str
    """`random`, `checkpoint` or `upcycle`."""
    name: str | None
    """Of the directory that it was read from."""


class RunReport(ReportPart):
    """What a run has cost and reached; while it runs, of the stages so far."""

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
    """Each round after which the sub-models' backbones became one: its members, and who was late."""
    corpus: dict[str, Any]
    """Summary of the corpus stage."""
    clusters: dict[str, Any]
    """How the documents were grouped; see `GET .../clusters`."""
    evaluation: dict[str, Any]
    """Perplexity by cluster and by source."""
    merge: dict[str, Any] = Field(default_factory=dict)
    """Summary of the merge stage."""
    samples: list[ReportSample]
    curves: dict[str, ReportCurve]
    """Training loss by unit."""
    held_out: dict[str, ReportCurve] = Field(default_factory=dict)
    """Held-out loss by unit, where the configuration asks for it."""
    versions: dict[str, str]
    """Packages that made the newest stage."""
