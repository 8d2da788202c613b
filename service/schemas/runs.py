"""Runs and their units."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moedisco_ray.core.bill import Bill
from service.domain.states import RunState
from service.schemas.base import Document


class Money(Document):
    """What a run costs."""

    dollars: float
    """Total of the run's bill so far, every attempt included."""
    worker_seconds: dict[str, float]
    """Per pool."""
    estimate_dollars: float | None
    """Total of the plan's bill; null where the plan cannot know it."""
    budget_dollars: float | None


class StageProgress(Document):
    """One stage of the pipeline."""

    name: str
    status: Literal["waiting", "running", "done", "reused", "failed"]
    started: float | None
    seconds: float | None


class Run(Document):
    """A run as it stands."""

    id: str
    name: str
    owner: str
    tags: dict[str, str]
    priority: int
    state: RunState
    reason: str | None
    """Why it is in this state: what it waits for, why it failed."""
    position: int | None
    """Place in the queue, from 1; null once it is out of it."""
    attempt: int
    """Drivers started so far."""
    parent: str | None
    """The run it is a retry of."""
    created: float
    queued: float
    started: float | None
    ended: float | None
    updated: float
    stages: list[StageProgress]
    money: Money
    kept: bool = False
    """Retention leaves it."""
    expires_at: float | None = None
    """When retention removes it with its files, as announced; null: not announced."""
    disk_bytes: int | None = None
    """Size of its directory when it was last measured."""
    events: int
    """Length of its event stream so far."""
    job_url: str | None
    """Page of its job in the Ray dashboard, through the service; for administrators, once it has a driver."""


class RunDetail(Run):
    """A run with its configuration and its bill."""

    notes: list[str] = Field(default_factory=list)
    """Remarks on how it was taken, such as prices that the operator's replaced."""
    config: dict[str, Any]
    bill: Bill
    """What the run has cost so far: as in `report.json`."""
    estimate: Bill
    """What the plan said when the run was submitted."""


class RunPage(Document):
    """Runs, newest first."""

    items: list[Run]
    next_cursor: str | None
    """Ask with `cursor` of this for what follows; null: that was all."""


class Unit(Document):
    """A part of a stage with its own progress: the seed, a sub-model, the fine-tune."""

    unit: str
    stage: str
    status: Literal["running", "restarting", "done"]
    step: int
    steps: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    restarts: int
    workers: int
    node: str | None
    started: float | None
    ended: float | None


class UnitPage(Document):
    """Parts of a run that train by themselves, in the order in which they started."""

    items: list[Unit]


class TrainingWorker(Document):
    """A worker process of a training."""

    rank: int
    node: str
    """Address of its node."""
    state: str | None
    """Ray's word on its actor: `ALIVE` or `DEAD`; null: unknown."""
    gpus: list[int]
    """Indices of its GPUs on the node."""


class TrainingAttempt(Document):
    """A group of workers that was started for a training."""

    state: str
    """Ray Train's word: `PENDING`, `RUNNING`, `FINISHED`, `ERRORED`, `ABORTED`."""
    detail: str | None
    """Why, where Ray Train says it."""
    started: float
    ended: float | None
    workers: list[TrainingWorker]


class Training(Document):
    """One training of the seed, a sub-model or the fine-tune, as Ray Train sees it."""

    unit: str
    run_attempt: int
    """Attempt of the run whose driver started it."""
    state: str
    """Ray Train's word: `INITIALIZING`, `SCHEDULING`, `RUNNING`, `RESTARTING`, `RESIZING`, `FINISHED`, `ERRORED`, `ABORTED`."""
    detail: str | None
    """Why, where Ray Train says it."""
    started: float
    ended: float | None
    attempts: list[TrainingAttempt]


class TrainingPage(Document):
    """Trainings of a run, in the order in which they started."""

    items: list[Training]
