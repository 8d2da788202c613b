"""Usage of a run, computed from its events: worker-seconds per stage and pool, over all attempts, even while it runs.

A mixed pool is metered per node type, because prices differ.

A worker is paid for while it holds a slot of its pool, whatever it does: start-ups and work that was lost with a
machine are included. A hold without an end counts up to the newest event, which a heartbeat keeps within seconds of the
present.

A machine is paid for while it exists, whether or not a worker holds it: the time of free slots is counted as idle
slot-seconds. Free slots are counted for the whole pool, so two runs at the same time on one Ray cluster both count
them.

What was counted is never taken back: a hold ends at the time of the newest event, even if the event of its end is a
little older.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.prices import dollars_of
from moedisco_ray.core.records.ways import Alternative, stored_ways
from moedisco_ray.core.stages import STAGES

_STAGES = frozenset(stage.name for stage in STAGES)
_MOST = 1e15
"""Numbers in events that are this large or larger are invalid."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Time of slots, and what was charged for it.

    Attributes:
        seconds: Number of slots times seconds.
        dollars: Charge for the time whose events state a price.
        unpriced: The part of `seconds` whose events state no price.
    """

    seconds: float = 0.0
    dollars: float = 0.0
    unpriced: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.seconds + other.seconds, self.dollars + other.dollars, self.unpriced + other.unpriced)


@dataclasses.dataclass(frozen=True)
class Hold:
    """Slots of a pool that the workers of a stage hold.

    Attributes:
        pool: `low_memory` or `high_memory`; a node type of a mixed pool is `low_memory.NAME`.
        workers: Number of workers, each with one slot.
        since: Start of the hold, in seconds since the epoch.
        stage: Stage whose workers hold the slots.
        price_per_hour: Dollars per worker-hour, as the event of the hold states it; None if it does not.
    """

    pool: str
    workers: int
    since: float
    stage: str
    price_per_hour: float | None = None

    def used(self, end: float) -> Usage:
        """The usage from the start of the hold to a moment (seconds since the epoch)."""
        return _usage(self.workers, self.since, end, self.price_per_hour)


@dataclasses.dataclass(frozen=True)
class Free:
    """Slots that exist and that no worker holds.

    Attributes:
        slots: Number of free slots.
        since: Time since which the slots are free, in seconds since the epoch.
        price_per_hour: Dollars per slot-hour, as the event states it; None if it does not.
    """

    slots: int
    since: float
    price_per_hour: float | None = None

    def used(self, end: float) -> Usage:
        """The usage from `since` to a moment (seconds since the epoch)."""
        return _usage(self.slots, self.since, end, self.price_per_hour)


@dataclasses.dataclass
class Meter:
    """The usage of a run so far, updated by each event; it can be stored as JSON.

    Attributes:
        closed: Usage of the holds that have ended, per stage and pool.
        open: Holds that have not ended, by the hold's id.
        newest: Time of the newest event, in seconds since the epoch.
        idle: Usage of slots without a worker, up to the last change of `free`, per pool.
        free: Slots without a worker, as the newest event about them says, per pool.
        stage: The current stage, or the last one.
        elapsed: Wall-clock seconds of the attempts that have ended.
        began: Start of the current attempt, in seconds since the epoch; None between attempts.
        made: Whether the newest attempt started a stage, or held workers.
        finished: Whether the newest attempt completed the run.
        ways: The ways to train the model that the newest attempt's plan has compared, the run itself last.
    """

    closed: dict[str, dict[str, Usage]] = dataclasses.field(default_factory=dict)
    open: dict[str, Hold] = dataclasses.field(default_factory=dict)
    newest: float = 0.0
    idle: dict[str, Usage] = dataclasses.field(default_factory=dict)
    free: dict[str, Free] = dataclasses.field(default_factory=dict)
    stage: str = ""
    elapsed: float = 0.0
    began: float | None = None
    made: bool = False
    finished: bool = False
    ways: tuple[Alternative, ...] = ()

    def update(self, event: Event) -> None:
        """Update the usage with the next event."""
        if event.type == "run_started":
            self._close_all()  # an earlier driver's holds ended with its last event
            self._end_attempt()
            self.began, self.made, self.finished = event.time, False, False
            self.ways = stored_ways(event.data.get("ways"))
        self.newest = max(self.newest, event.time)
        match event.type:
            case "stage_skipped" if "run" in event.data:
                self.ways = ()  # the plan's figures are those of all stages, of which another run has paid some
            case "stage_started":
                self.made = True
                self.stage = self._stage_of(event)
            case "workers_held":
                self._hold(event)
            case "workers_released":
                self._close(event.data["hold"])
            case "slots_free":
                self._end_idle(event.data["pool"], event.time)
                self.free[event.data["pool"]] = Free(event.data["slots"], event.time, _price(event))
            case "run_finished" | "run_failed" | "run_stopped":
                self._close_all()
                self.finished = event.type == "run_finished"
                if self.finished and not self.made:
                    self.began = None
                self._end_attempt()

    @property
    def charges(self) -> dict[str, dict[str, Usage]]:
        """Usage per stage and pool, up to the newest event."""
        totals = {stage: dict(pools) for stage, pools in self.closed.items()}
        for hold in self.open.values():
            _add(totals.setdefault(hold.stage, {}), hold.pool, hold.used(self.newest))
        return totals

    @property
    def usage(self) -> dict[str, dict[str, float]]:
        """Worker-seconds per stage and pool, up to the newest event."""
        return {stage: _seconds(pools) for stage, pools in self.charges.items()}

    @property
    def worker_seconds(self) -> dict[str, float]:
        """Worker-seconds per pool, up to the newest event."""
        totals: dict[str, float] = {}
        for pools in self.usage.values():
            for pool, seconds in pools.items():
                totals[pool] = totals.get(pool, 0.0) + seconds
        return totals

    @property
    def idle_charges(self) -> dict[str, Usage]:
        """Usage of slots without a worker, per pool, up to the newest event."""
        totals = dict(self.idle)
        for pool, free in self.free.items():
            _add(totals, pool, free.used(self.newest))
        return totals

    @property
    def wall_seconds(self) -> float:
        """Wall-clock seconds of all attempts, without the time between them and without those that found all made."""
        return self.elapsed + (0.0 if self.began is None else max(0.0, self.newest - self.began))

    def to_dict(self) -> dict[str, Any]:
        """The usage as plain values."""
        return dataclasses.asdict(self) | {"ways": [each.model_dump(mode="json") for each in self.ways]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Meter:
        """The inverse of `to_dict`; an empty dictionary gives a new meter.

        Raises:
            ValidationError: The values are not those of a meter of this version.
        """
        return _form().validate_python(values)

    def _stage_of(self, event: Event) -> str:
        return event.stage if event.stage in _STAGES else self.stage

    def _hold(self, event: Event) -> None:
        self.made = True
        hold = event.data["hold"]
        self._close(hold)
        self.open[hold] = Hold(
            event.data["pool"], event.data["workers"], event.time, self._stage_of(event), _price(event)
        )
        if until := _number(event.data.get("until")):
            self._close(hold, until)

    def _close_all(self) -> None:
        for name in list(self.open):
            self._close(name)
        for pool in list(self.free):
            self._end_idle(pool, self.newest)

    def _end_attempt(self) -> None:
        self.elapsed, self.began = self.wall_seconds, None

    def _end_idle(self, pool: str, end: float) -> None:
        _add(self.idle, pool, self.free.pop(pool, Free(0, end)).used(end))

    def _close(self, name: str, end: float | None = None) -> None:
        """End a hold, if there is one with this id, by default at the time of the newest event."""
        hold = self.open.pop(name, None)
        if hold is not None:
            _add(self.closed.setdefault(hold.stage, {}), hold.pool, hold.used(self.newest if end is None else end))


def _usage(slots: int, since: float, end: float, price_per_hour: float | None) -> Usage:
    seconds = slots * max(0.0, end - since)
    if price_per_hour is None:
        return Usage(seconds, unpriced=seconds)
    return Usage(seconds, dollars_of(seconds, price_per_hour))


def _seconds(pools: Mapping[str, Usage]) -> dict[str, float]:
    return {pool: used.seconds for pool, used in pools.items()}


def _price(event: Event) -> float | None:
    price = event.data.get("price_per_hour")
    return price if isinstance(price, int | float) and 0 <= price < _MOST else None


def _add(totals: dict[str, Usage], pool: str, used: Usage) -> None:
    totals[pool] = totals.get(pool, Usage()) + used


@functools.cache
def _form() -> TypeAdapter[Meter]:
    """Made when it is needed: that takes as long as the imports of ten modules, and few commands need it."""
    return TypeAdapter(Meter)


def _number(value: object) -> float:
    """A finite number that is not negative; 0 for anything else, because a driver's events are not trusted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if 0 < value < _MOST else 0.0
