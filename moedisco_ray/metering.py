"""What a run has used, as a fold over its events: worker-seconds per pool, while it runs and over every attempt.

A mixed pool counts per node type: they differ in price.

A worker is paid for while it holds a slot of its pool, whatever it does: start-up and work that was lost with a machine
are in the figure. A hold that nobody ended is counted up to the newest event, which a heartbeat keeps within seconds.

A machine is paid for while it is there, whether or not a worker holds it: slots that are free are idle slot-seconds. They are
the whole pool's: two runs at once on one cluster both see them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moedisco_ray.events import Event


@dataclasses.dataclass(frozen=True)
class Hold:
    """Slots that are held.

    Attributes:
        pool: `low_memory` or `high_memory`; a node type of a mixed pool is `low_memory.NAME`.
        workers: How many slots.
        since: When the holding began, in seconds since the epoch.
    """

    pool: str
    workers: int
    since: float


@dataclasses.dataclass(frozen=True)
class Free:
    """Slots that are there and that nobody holds.

    Attributes:
        slots: How many.
        since: From when on, in seconds since the epoch.
    """

    slots: int
    since: float


@dataclasses.dataclass
class Meter:
    """The fold's state; plain enough for a JSON column.

    Attributes:
        closed: Worker-seconds of the holds that have ended, per pool.
        open: Holds that have not, by their name.
        newest: Time of the newest event.
        idle: Idle slot-seconds up to the last change, per pool.
        free: Free slots as they were last seen, per pool.
    """

    closed: dict[str, float] = dataclasses.field(default_factory=dict)
    open: dict[str, Hold] = dataclasses.field(default_factory=dict)
    newest: float = 0.0
    idle: dict[str, float] = dataclasses.field(default_factory=dict)
    free: dict[str, Free] = dataclasses.field(default_factory=dict)

    def update(self, event: Event) -> None:
        """Take the next event in."""
        if event.type == "run_started":
            self._close_all()   # what an earlier driver held ended with it: at its last sign of life, as far as anybody knows
        self.newest = max(self.newest, event.time)
        if event.type == "workers_held":
            self.open[event.data["hold"]] = Hold(event.data["pool"], event.data["workers"], event.time)
        elif event.type == "workers_released" and event.data["hold"] in self.open:
            self._close(event.data["hold"], event.time)
        elif event.type == "slots_free":
            self._end_idle(event.data["pool"], event.time)
            self.free[event.data["pool"]] = Free(event.data["slots"], event.time)
        elif event.type in ("run_finished", "run_failed", "run_stopped"):
            self._close_all()

    @property
    def worker_seconds(self) -> dict[str, float]:
        """Per pool, up to the newest event."""
        totals = dict(self.closed)
        for hold in self.open.values():
            totals[hold.pool] = totals.get(hold.pool, 0.0) + hold.workers * max(0.0, self.newest - hold.since)
        return totals

    @property
    def idle_seconds(self) -> dict[str, float]:
        """Slot-seconds per pool that nobody held, up to the newest event."""
        totals = dict(self.idle)
        for pool, free in self.free.items():
            totals[pool] = totals.get(pool, 0.0) + free.slots * max(0.0, self.newest - free.since)
        return totals

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Meter:
        """The inverse of `to_dict`; of nothing, a new meter."""
        if not values:
            return cls()
        return cls(
            dict(values["closed"]), {name: Hold(**hold) for name, hold in values["open"].items()}, values["newest"],
            dict(values["idle"]), {pool: Free(**free) for pool, free in values["free"].items()})

    def _close_all(self) -> None:
        for name in list(self.open):
            self._close(name, self.newest)
        for pool in list(self.free):
            self._end_idle(pool, self.newest)

    def _end_idle(self, pool: str, end: float) -> None:
        free = self.free.pop(pool, Free(0, end))
        self.idle[pool] = self.idle.get(pool, 0.0) + free.slots * max(0.0, end - free.since)

    def _close(self, name: str, end: float) -> None:
        hold = self.open.pop(name)
        self.closed[hold.pool] = self.closed.get(hold.pool, 0.0) + hold.workers * max(0.0, end - hold.since)
