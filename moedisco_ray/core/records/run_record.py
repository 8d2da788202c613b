"""`report.json` as a typed record, which `report` builds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moedisco_ray.core.records.bill import Bill
from moedisco_ray.core.records.cut import DecomposeSummary
from moedisco_ray.core.records.export_summary import Sample
from moedisco_ray.core.records.summaries import (
    ClusterReport,
    Contribution,
    CorpusSummary,
    Departure,
    EvaluationRecord,
    MergeSummary,
    Record,
    SyncRecord,
)

SCHEMA_VERSION = 1

RunState = Literal["finished", "running", "stopped", "failed", "interrupted"]


class UnfinishedUnit(Record):
    """A sub-model that the merge did not wait for."""

    name: str
    contribution: Contribution
    steps: int
    planned_steps: int
    reason: str | None


class StageReport(Record):
    """One finished stage."""

    name: str
    pool: str
    """Pool that ran the stage: `low_memory` or `high_memory`; `head` if it ran on the head node."""
    workers: float
    """Number of workers that ran at the same time; the average for a gang whose size changed."""
    seconds: float
    """Wall-clock seconds that the stage took when it last completed."""
    tokens: int | None
    """Number of tokens that the stage trained on; null if it trains nothing."""
    worker_seconds: float
    """Seconds summed over workers, including their start-up; 0 if the stage holds no slot with a price."""
    training_worker_seconds: float | None = None
    """Seconds of the training loops, summed over workers, without start-ups."""
    tokens_per_second_per_worker: float | None = None
    """Mean training speed of one worker (tokens/s)."""
    mfu: float | None = None
    """Model FLOPs utilisation: the share of the GPUs' peak speed that training reached; null on CPUs and unknown
    GPUs."""
    stalled: float | None = None
    """Share of the training time in which training stood still while checkpoints were saved."""
    dollars: float
    loss: float | None
    """Final training loss (nats per token): the mean over the stage's trainings, each weighted by its tokens."""
    perplexity: float | None
    """Perplexity on validation documents; for `submodels`, each model on its own cluster."""
    bits_per_byte: float | None
    """Bits per byte on validation documents."""
    unfinished: list[UnfinishedUnit] = Field(default_factory=list)
    """Sub-models that the merge did not wait for."""
    outdated: bool = False
    """Whether the stage was made with other settings, or from other artifacts, than the run has now."""


class Curve(Record):
    """Loss of a unit over the tokens that it was trained on, with at most 400 points."""

    stage: str | None
    tokens: list[int]
    loss: list[float]
    """Nats per token."""


class MachineNote(Record):
    """What was measured on the slots with one kind of card."""

    kind: str
    """Name of the card, the versions of its driver and of torch."""
    slots: int
    """Number of slots that were looked at."""
    measured_at: float
    """Time of the measurement (s since the epoch)."""
    free_bytes: int | None = None
    """Smallest free memory of these cards (bytes)."""
    tflops: dict[str, float] = Field(default_factory=dict)
    """Median speed of two layers of the model that a stage trains (TFLOP/s), by stage."""
    mfu: dict[str, float] = Field(default_factory=dict)
    """The same as a share of the card's peak."""
    problems: list[str] = Field(default_factory=list)
    """Checks that did not pass."""
    words: str
    """The measurement in one line."""


class StartComparison(Record):
    """A finished model compared with the trained model that its run started from, on the same held-out text."""

    worse: bool
    """Whether the finished model predicts the text worse than the start: whether the run has harmed what came in."""
    perplexity: float
    """Perplexity of the finished model."""
    start_perplexity: float
    """Perplexity of the model that the run started from."""
    words: str
    """The comparison as a sentence without a full stop."""


class StartRecord(Record):
    """What the model was started from."""

    kind: str
    """How the model was started: from `random` weights, from a `checkpoint`, or by an `upcycle` of a dense model."""
    name: str | None
    """Name of the directory from which the model was read; null for random weights."""


class RunReport(Record):
    """Cost and results of a run; while it runs, the cost so far and the results of its finished stages."""

    schema_version: int = SCHEMA_VERSION
    against_start: StartComparison | None = None
    """The finished model compared with the trained model that the run started from; null for random weights, and if it
    was not measured."""
    submodels_apart: str | None = None
    """Whether the run's model is its sub-models, kept apart, or merged from them, and why, as a sentence without a full
    stop; null in runs that did not compare the two."""
    name: str
    seed: int
    tags: dict[str, str]
    family: str
    """Model family, such as `qwen3_moe`."""
    start: StartRecord | None = None
    stages: list[StageReport]
    """Finished stages, in the pipeline's order."""
    tokens: int
    """Number of tokens that the run trained on, over all stages."""
    bill: Bill
    """What the run has cost: lines, totals, idle machines, time, baseline, saving, quality."""
    members: int | None = None
    """Number of members that trained the whole model, each on a part of the text; null if no members did."""
    syncs: list[SyncRecord] = Field(default_factory=list)
    """Sync points of the sub-models, or of the members that trained the whole model; empty if there were none."""
    corpus: CorpusSummary = CorpusSummary()
    """Summary of the corpus stage."""
    clusters: ClusterReport = ClusterReport()
    """How the documents were grouped."""
    evaluation: EvaluationRecord = EvaluationRecord()
    """What was measured on the validation text, and on other text and tasks."""
    decompose: DecomposeSummary = DecomposeSummary()
    """Summary of the decompose stage."""
    merge: MergeSummary = MergeSummary()
    """Summary of the merge stage."""
    samples: list[Sample] = Field(default_factory=list)
    """Texts that the finished model wrote."""
    curves: dict[str, Curve]
    """Training loss by unit."""
    held_out: dict[str, Curve] = Field(default_factory=dict)
    """Held-out loss by unit, if the configuration asks for it."""
    machines: list[MachineNote] = Field(default_factory=list)
    """What was measured on the cards of the run before it began; empty if nothing was."""
    left: list[Departure] = Field(default_factory=list)
    """What left the storages of data owners; empty if no text has an owner."""
    versions: dict[str, str]
    """Versions of the packages that made the newest stage."""
    state: RunState | None = None
    """Current state of the run; not stored in a finished run's file."""
    state_reason: str | None = None
    """Why the run failed or stopped; null in other states."""
