"""What a run has used, as a fold over its events: worker-seconds per pool, while it runs and over every attempt.

A mixed pool counts per node type: they differ in price.

A worker is paid for while it holds a slot of its pool, whatever it does: start-up and work that was lost with a machine
are in the figure. A hold that nobody ended is counted up to the newest event, which a heartbeat keeps within seconds.
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


@dataclasses.dataclass
class Meter:
    """The fold's state; plain enough for a JSON column.

    Attributes:
        closed: Worker-seconds of the holds that have ended, per pool.
        open: Holds that have not, by their name.
        newest: Time of the newest event.
    """

    closed: dict[str, float] = dataclasses.field(default_factory=dict)
    open: dict[str, Hold] = dataclasses.field(default_factory=dict)
    newest: float = 0.0

    def update(self, event: Event) -> None:
        """Take the next event in."""
        if event.type == "run_started":
            self._close_all()   # what an earlier driver held ended with it: at its last sign of life, as far as anybody knows
        self.newest = max(self.newest, event.time)
        if event.type == "workers_held":
            self.open[event.data["hold"]] = Hold(event.data["pool"], event.data["workers"], event.time)
        elif event.type == "workers_released" and event.data["hold"] in self.open:
            self._close(event.data["hold"], event.time)
        elif event.type in ("run_finished", "run_failed", "run_stopped"):
            self._close_all()

    @property
    def worker_seconds(self) -> dict[str, float]:
        """Per pool, up to the newest event."""
        totals = dict(self.closed)
        for hold in self.open.values():
            totals[hold.pool] = totals.get(hold.pool, 0.0) + hold.workers * max(0.0, self.newest - hold.since)
        return totals

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Meter:
        """The inverse of `to_dict`; of nothing, a new meter."""
        if not values:
            return cls()
        return cls(dict(values["closed"]), {name: Hold(**hold) for name, hold in values["open"].items()}, values["newest"])

    def _close_all(self) -> None:
        for name in list(self.open):
            self._close(name, self.newest)

    def _close(self, name: str, end: float) -> None:
        hold = self.open.pop(name)
        self.closed[hold.pool] = self.closed.get(hold.pool, 0.0) + hold.workers * max(0.0, end - hold.since)
