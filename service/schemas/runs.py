"""Runs and the trainings in them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moedisco_ray.core.records.bill import Bill
from service.domain.access import Role
from service.domain.states import RunState
from service.schemas.base import Document


class Money(Document):
    """Cost of a run."""

    dollars: float
    """Cost of the run so far, over all attempts (dollars)."""
    worker_seconds: dict[str, float]
    """Worker-seconds used so far, by pool."""
    estimate_dollars: float | None
    """Planned cost of the stages that the run makes itself (dollars); null if it cannot be estimated."""
    budget_dollars: float | None


class StageProgress(Document):
    """One stage of the pipeline."""

    name: str
    status: Literal["waiting", "running", "done", "reused", "failed"]
    started: float | None
    seconds: float | None


class Results(Document):
    """Figures of a run, by which lists can be sorted and filtered."""

    perplexity: float | None = None
    """Perplexity of the finished model on the validation text; null before the evaluation."""
    bits_per_byte: float | None = None
    """Bits per byte of the finished model on the validation text."""
    held_out_loss: float | None = None
    """Mean loss of the finished model on the validation text (nats per token)."""
    active_parameters: int | None = None
    """Number of parameters that take part in computing one token; null before the export."""
    tokens: int | None = None
    """Number of tokens on which the run has trained; null before the end."""
    hours: float | None = None
    """Wall-clock hours of all attempts, without the time between them; null before the end."""


class RunProject(Document):
    """The project of a run."""

    id: str
    name: str
    owner: str
    role: Role
    """What the caller is in the project; administrators count as its owner."""


class Run(Document):
    """A run in its current state."""

    id: str
    version: int
    """Version of the run's state and settings, which is also its `ETag`; progress and cost do not change it."""
    name: str
    owner: str
    """Person whose token submitted the run; it counts against this person's quota."""
    project: RunProject
    """Project whose members may see the run."""
    tags: dict[str, str]
    priority: int
    state: RunState
    reason: str | None
    """Why the run is in this state: what it waits for, or why it failed."""
    position: int | None
    """Place in the queue, from 1; null if the run is not queued."""
    attempt: int
    """Number of drivers started so far."""
    parent: str | None
    """Id of the run that this one retries."""
    created: float
    queued: float
    started: float | None
    ended: float | None
    updated: float
    stages: list[StageProgress]
    money: Money
    results: Results = Results()
    note: str | None = None
    """The owner's own note."""
    kept: bool = False
    """Whether the run is exempt from retention."""
    notice: str | None = None
    """Why the run cannot be shown or processed in full, such as that an earlier version recorded it; null if it can."""
    expires_at: float | None = None
    """Time at which retention will remove the run with its files; null if no removal is announced."""
    disk_bytes: int | None = None
    """Size of the run directory and of checkpoints in other storage, as last measured (bytes). Files that several runs
    of the owner share count for the oldest of them."""
    events: int
    """Number of events in the run's stream so far."""
    job_url: str | None
    """URL of the run's job in the Ray dashboard, for administrators; null before the first driver."""


class Forecast(Document):
    """The expected end of an active run, from its plan and its progress so far."""

    ends: float
    """Expected time of the end (seconds since the epoch)."""
    dollars: float | None
    """Expected cost of the whole run (dollars); null if the plan knows no prices."""


class Failure(Document):
    """Where a run failed, and what may help."""

    stage: str | None
    """Stage that failed; null if none had begun."""
    unit: str | None
    """Training that failed, whose worker's log is `UNIT.0`; null if the failure is of no single training."""
    setting: str | None
    """Dotted path of the setting to look at; null if there is none."""
    changes: dict[str, float]
    """Values that may help, by dotted path, as `changes` of a retry takes them."""
    meaning: str
    """What these changes do, in words."""


class Reused(Document):
    """Stages that a run takes from another run, instead of making them."""

    run: str
    """Id of the other run."""
    name: str | None
    """Name of the other run; null if it was deleted."""
    stages: list[str]
    """Names of the stages, in pipeline order."""


class RunDetail(Run):
    """A run with its configuration and its bill."""

    notes: list[str] = Field(default_factory=list)
    """Remarks from the submission, such as which of the configuration's prices the operator's prices replaced."""
    reuses: list[Reused] = Field(default_factory=list)
    """Stages that were taken from other runs."""
    config: dict[str, Any]
    bill: Bill
    """Cost of the run so far, as in `report.json`."""
    estimate: Bill
    """Planned cost at submission."""
    failure: Failure | None = None
    """Where the run failed; null if it did not."""
    parent_held_out_loss: float | None = None
    """Held-out loss of the run that this one retries (nats per token); null if it has none, or the caller may not see
    that run."""
    forecast: Forecast | None = None
    """The expected end; null if the run is not active, or if its plan does not know the speed of its machines."""


class RunPage(Document):
    """Runs in the order of the request."""

    items: list[Run]
    next_cursor: str | None
    """Value of `cursor` for the next page of the same list; null on the last page."""


class Unit(Document):
    """A part of a stage with its own progress: the seed, a sub-model or the fine-tune."""

    unit: str
    stage: str
    status: Literal["running", "restarting", "done"]
    step: int
    steps: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    mfu: float | None = None
    """Model FLOPs utilisation: the share of the GPUs' peak FLOP/s; null on CPUs and on GPUs with an unknown peak."""
    restarts: int
    workers: int
    node: str | None
    started: float | None
    ended: float | None


class UnitPage(Document):
    """Units of a run, in the order in which they started."""

    items: list[Unit]
