"""Tables of runs with their events, units and points."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from sqlalchemy import ForeignKey, Index, String, false, text
from sqlalchemy.orm import Mapped, mapped_column

from moedisco_ray.core.config import Pools, RunConfig
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.renamed import gone_values, stored_config
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.store.locations import Location
from service.database.documents import DAMAGED, Planned, Progress, Stored, Unreadable
from service.database.table import ULID, Table
from service.domain.run_paths import home_of, location_of, own_storage
from service.errors import UnusableRun


class RunRow(Table):
    """A run: its request and its current state."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    name: Mapped[str]
    owner: Mapped[str]
    """Person whose token submitted the run; it counts against this person's quota."""
    project: Mapped[str] = mapped_column(ULID, server_default=text("''"))
    """Id of the project, whose members may see the run."""
    tags: Mapped[dict[str, Any]] = mapped_column(Stored(dict[str, str], often=True))
    priority: Mapped[int] = mapped_column(default=0)
    """Priority in the queue; higher starts first."""
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None]
    """Why the run is in this state: what it waits for, or why it failed."""
    version: Mapped[int] = mapped_column(default=1)
    """Version of the row, incremented by every change; a writer that read an older version is refused."""
    config: Mapped[dict[str, Any]] = mapped_column(Stored(dict[str, Any], version=1, any_version=True, often=True))
    """Resolved configuration; `output` and `name` determine the run directory."""
    directory: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    """Number of drivers started so far."""
    futile: Mapped[int] = mapped_column(default=0)
    """Number of consecutive drivers that were lost without progress."""
    mark: Mapped[int] = mapped_column(default=0)
    """Furthest progress in stages and steps, as a number that never falls; a driver that does not raise it made no
    progress."""
    mark_at_start: Mapped[int] = mapped_column(default=0)
    """`mark` when the current attempt began."""
    stop: Mapped[str | None] = mapped_column(String(16))
    """Why the run was asked to stop; see `service.domain.outcome.Stop`."""
    budget_dollars: Mapped[float | None]
    dollars: Mapped[float] = mapped_column(default=0.0)
    """Dollars metered so far, over all attempts."""
    worker_seconds: Mapped[dict[str, Any]] = mapped_column(Stored(dict[str, float], often=True))
    """Worker-seconds by pool or node type."""
    meter: Mapped[dict[str, Any]] = mapped_column(Stored(dict[str, Any], version=1, often=True))
    """State of the meter; see `moedisco_ray.core.records.metering`."""
    estimate: Mapped[dict[str, Any]] = mapped_column(Stored(Planned, version=1, often=True))
    """Plan of the run at submission."""
    progress: Mapped[dict[str, Any]] = mapped_column(Stored(Progress, version=1, often=True))
    """{stages: {name: {status, started, seconds}}, current, reached: {stages, steps}, ended: {type, time, message or
    reason}}; `ended`, the driver's final event, exists until the next driver begins."""
    parent: Mapped[str | None] = mapped_column(ULID)
    """Id of the run that this one retries."""
    notes: Mapped[list[str] | None] = mapped_column(Stored(list[str] | None, often=True))
    """Remarks from the submission, such as replaced prices; null in runs of an earlier version."""
    note: Mapped[str | None]
    """The owner's own note; null if there is none."""
    kept: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether the run is exempt from retention."""
    expires_at: Mapped[float | None]
    """Announced time of removal by retention; null if no removal is announced."""
    disk_bytes: Mapped[int | None]
    """Size of the run directory and of checkpoints in other storage, as last measured (bytes), without the files that
    have several names; see `sharers`."""
    measured: Mapped[float | None]
    """Time of the last measurement of `disk_bytes`."""
    trouble: Mapped[str | None]
    """Why the service cannot process the run; null if it can."""
    next_position: Mapped[int] = mapped_column(default=0)
    """Position of the next event in the run's stream."""
    next_seq: Mapped[int] = mapped_column(default=0)
    """Number of the next line of the driver's `events.jsonl`; a driver on a new machine may begin with a lower one."""
    created: Mapped[float]
    queued: Mapped[float]
    started: Mapped[float | None]
    ended: Mapped[float | None]
    end_posted: Mapped[float | None]
    """Time at which the operator's URL accepted the message about the end; null before."""
    noticed: Mapped[float | None]
    """Time at which the URL of the run's project accepted the notice about the end; null before."""
    updated: Mapped[float]
    perplexity: Mapped[float | None]
    """Perplexity of the finished model on the validation text; null before the evaluation."""
    bits_per_byte: Mapped[float | None]
    held_out_loss: Mapped[float | None]
    """Mean loss of the finished model on the validation text (nats per token)."""
    active_parameters: Mapped[int | None]
    """Number of parameters that take part in computing one token; null before the export."""
    tokens: Mapped[int | None]
    """Number of tokens on which the run's units have trained; null before the end."""
    hours: Mapped[float | None]
    """Wall-clock hours of all attempts, without the time between them; null before the end."""

    __table_args__ = (
        Index("runs_by_state", "state", "priority", "queued"),
        Index("runs_by_owner", "owner", "id"),
        Index("runs_by_end", "end_posted", "ended"),
        Index("runs_by_notice", "noticed", "ended"),
        Index("runs_by_creation", "created", "id"),
        # Lists in any order are sorted in this index, without the rows, which are long.
        Index(
            "runs_by_figures",
            *("project", "owner", "id", "created", "name", "state", "perplexity", "bits_per_byte", "held_out_loss"),
            *("active_parameters", "tokens", "hours"),
        ),
        # The sizes are summed every second; this index avoids reading the rows, which are long.
        Index("runs_by_size", "owner", "disk_bytes"),
    )

    @property
    def unreadable(self) -> str | None:
        """Why this version cannot read all of the run's loaded documents; None if it can."""
        loaded = self.__dict__
        found = (loaded.get(name) for name in _DOCUMENTS)
        return next((document.why for document in found if isinstance(document, Unreadable)), None)

    @property
    def usage(self) -> Meter:
        """A copy of the run's meter.

        Raises:
            UnusableRun: This version cannot read the stored meter.
        """
        try:
            return Meter.from_dict(_readable(self.meter))
        except ValidationError as error:
            raise UnusableRun(f"{DAMAGED}; {_REMEDY}") from error

    def check_readable(self) -> None:
        """Check that the run can be metered and supervised.

        Raises:
            UnusableRun: This version cannot read one of the run's documents.
        """
        _ = self.usage, self.pools
        if self.unreadable is not None:
            raise UnusableRun(f"{self.unreadable}; {_REMEDY}")

    @property
    def location(self) -> Location:
        """Path or URI of the run directory."""
        return location_of(str(self.config.get("output", "")), Path(self.directory))

    @property
    def settings(self) -> RunConfig:
        """The run's configuration.

        Raises:
            UnusableRun: Another version of the software stored the configuration, and this one refuses it.
        """
        try:
            return _settings(json.dumps(_readable(self.config)))[0]
        except ValidationError as error:
            raise _unusable(error) from error

    def check_repeatable(self) -> None:
        """Check that this version can start, continue or repeat the run as it was asked for.

        Raises:
            UnusableRun: A setting that is gone had another value than every run has now.
        """
        gone = [] if isinstance(self.config, Unreadable) else gone_values(self.config)
        if gone:
            raise UnusableRun(
                f"its stored configuration has settings that are gone: {', '.join(gone[:3])}; submit it as a new run"
            )

    @property
    def document(self) -> dict[str, Any]:
        """The run's configuration in this version's form, or as it was stored if this version refuses it.

        `checkpoint.storage` is the folder that the owner asked for, not the run's own folder in it.
        """
        try:
            shown = from_json(_settings(json.dumps(_readable(self.config)))[1])
        except (UnusableRun, ValidationError):
            stored = self.config.stored if isinstance(self.config, Unreadable) else self.config
            shown = stored if isinstance(stored, dict) else {}
        own = own_storage(shown, self.id)
        if own is None:
            return shown
        return {**shown, "checkpoint": {**shown["checkpoint"], "storage": str(home_of(own))}}

    @property
    def storage(self) -> str | None:
        """The run's own folder in `checkpoint.storage`; None if its checkpoints are in the run directory."""
        return own_storage(self.config, self.id)

    @property
    def pools(self) -> Pools:
        """The pools of the run's configuration.

        Raises:
            UnusableRun: This version refuses the stored pools.
        """
        try:
            return Pools.model_validate(_readable(self.config).get("pools", {}))
        except ValidationError as error:
            raise _unusable(error) from error


@functools.lru_cache(maxsize=256)
def _settings(document: str) -> tuple[RunConfig, str]:
    """The settings of a stored configuration, and their JSON; the page and the background ask for them every second."""
    settings = stored_config(json.loads(document))
    return settings, settings.model_dump_json()


_REMEDY = "submit it again"
_DOCUMENTS = ("tags", "config", "worker_seconds", "meter", "estimate", "progress", "notes")


def _readable(document: dict[str, Any]) -> dict[str, Any]:
    if isinstance(document, Unreadable):
        raise UnusableRun(f"{document.why}; {_REMEDY}")
    return document


def _unusable(error: ValidationError) -> UnusableRun:
    return UnusableRun(
        f"its stored configuration cannot be used by this version: {first_mistake(error.errors())}; submit it again "
        "with a valid configuration"
    )


class EventRow(Table):
    """An event in a run's stream, from a driver or from the service."""

    __tablename__ = "events"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Position in the stream, from 0 without gaps; the SSE id."""
    time: Mapped[float]
    type: Mapped[str] = mapped_column(String(32))
    """Type of a driver's event, or `state` with the data {state, reason, attempt}."""
    stage: Mapped[str | None] = mapped_column(String(32))
    unit: Mapped[str | None] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]

    # Rows are stored in the order in which they are read.
    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012 - SQLAlchemy's own form


class UnitRow(Table):
    """A part of a stage with its own progress: the seed, a sub-model or the fine-tune."""

    __tablename__ = "units"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    unit: Mapped[str] = mapped_column(String(64), primary_key=True)
    stage: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    """`running`, `restarting` or `done`."""
    step: Mapped[int] = mapped_column(default=0)
    steps: Mapped[int] = mapped_column(default=0)
    tokens: Mapped[int] = mapped_column(default=0)
    loss: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    mfu: Mapped[float | None]
    restarts: Mapped[int] = mapped_column(default=0)
    workers: Mapped[int] = mapped_column(default=1)
    node: Mapped[str | None]
    started: Mapped[float | None]
    ended: Mapped[float | None]


class Point(Table):
    """A point of a unit's curves; steps that are trained again after a restart replace the earlier points."""

    __tablename__ = "points"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    unit: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tokens: Mapped[int]
    time: Mapped[float]
    loss: Mapped[float | None]
    lr: Mapped[float | None]
    grad_norm: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    mfu: Mapped[float | None]
    largest_load: Mapped[float | None]
    """Largest load of an expert in any layer, in the last batch; 1 is balanced."""
    dead_experts: Mapped[int | None]
    """Number of experts of all layers that got almost no tokens, in the last batch."""

    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012 - as above


class HeldOutPoint(Table):
    """A measurement of the held-out loss during a unit's training; later steps that are measured again replace it."""

    __tablename__ = "held_out"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    unit: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tokens: Mapped[int]
    time: Mapped[float]
    held_out_loss: Mapped[float]

    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012 - as above
