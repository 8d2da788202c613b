"""The actor of a run that carries events to its driver, and keeps its seats while it has none.

It starts quickly, because this module imports neither torch nor Ray Train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from moedisco_ray.core.errors import RunError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray.boxes import Boxes
from moedisco_ray.execution.ray.named_actors import kill_named, named_actors
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.execution.sync_board import SyncBoard
from moedisco_ray.policies.checkpointing import HOUR, loss_rate
from moedisco_ray.policies.leasing import Kept, Silence, kept

TRAININGS = "trainings"
"""Box of the events of trainings, which stay for the next driver if this one dies."""
POLLS = "polls"
"""Concurrency group of the calls that wait for events: they must not hold up the others, which run in order."""
_WATCH_SECONDS = 1.0
"""Interval at which the actor checks whether a driver lives, in seconds."""


class TakenOverError(RunError):
    """Another driver works on the run now."""


@dataclasses.dataclass(frozen=True)
class UnderWay:
    """A training on a seat that an earlier driver has begun.

    Attributes:
        attempt: Id of the attempt.
        seat: Name of the seat.
        pool: Key of the seat's pool in the meter.
        checkpoints: Where the training keeps its checkpoints: a folder of all that its result depends on.
        node: Id of the seat's node.
        slots: Number of slots that the seat holds.
    """

    attempt: str
    seat: str
    pool: str
    checkpoints: str
    node: str
    slots: int = 1


Mark = tuple[str, str | None, float]
"""Type, unit and time of an event, which no other event of its run shares."""


def mark_of(event: Event) -> Mark:
    """The mark of an event."""
    return event.type, event.unit, event.time


class MailboxActor:
    """Stores events until the driver takes them, and each unit's status, outcome and held worker-seconds.

    A worker that lost its connection may outlive its attempt: only the newest attempt changes the status and outcome of
    a unit.

    The mailbox of a run outlives its driver. While the run has none, the mailbox ends the seats that do not train, and
    the others once their lease is over.

    Args:
        namespace: Ray namespace of the run's actors; empty if the mailbox ends with its driver.
        clock: Returns the current time in seconds.
    """

    def __init__(self, namespace: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._namespace = namespace
        self._clock = clock
        self._boxes = Boxes()
        self._attempts: dict[str, str] = {}
        self._outcomes: dict[str, bytes] = {}  # pickled: their classes would bring torch into this process
        self._meters: defaultdict[str, Meter] = defaultdict(Meter)
        self._statuses: defaultdict[str, UnitStatus] = defaultdict(UnitStatus)
        self._groups: dict[str, PlacementGroup] = {}
        self._actors: dict[str, ActorHandle] = {}
        self._on_seats: dict[str, UnderWay] = {}
        self._losses = 0
        self._ending: set[str] = set()
        self._syncs = SyncBoard()
        self._driver = ""
        self._stop = NEVER
        self._silence = Silence(clock)
        self._seen_at = time.time()
        self._expired_at: float | None = None
        self._known_holds: dict[str, Event] = {}
        self._inherits = False
        if namespace:
            threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def take_over(self, driver: str, stop: StopFile, logged: Sequence[Mark]) -> dict[str, UnderWay]:
        """Serve a new driver from now on.

        What the seats still hold is metered again, from the end of the last driver's log on.

        Args:
            driver: Id of the new driver.
            stop: File that, once it exists, ends the seats if no driver does.
            logged: The newest events in the run's log, up to the start of the new driver.

        Returns:
            The trainings on seats that an earlier driver has begun, by unit.
        """
        known = {*logged}
        starts = [number for number, (kind, *_) in enumerate(logged) if kind == "run_started"]
        earlier = logged[: starts[-1]] if starts else logged
        since = max((at for *_, at in earlier), default=self._seen_at)
        stored = itertools.takewhile(lambda event: mark_of(event) in known, self._boxes.all(TRAININGS))
        self.drop(TRAININGS, sum(1 for _ in stored))
        pending = self._boxes.all(TRAININGS)
        ends = {event.data["hold"]: event.time for event in pending if event.type == "workers_released"}
        # A gang has ended with its driver.
        held = [
            event for name, event in self._known_holds.items() if name in ends or event.data["unit"] in self._on_seats
        ]
        self._boxes.first(TRAININGS, [_again(event, since, ends) for event in held])
        self._known_holds.clear()
        self._meters.clear()
        for event in self._boxes.all(TRAININGS):
            if event.type in ("workers_held", "workers_released") and "unit" in event.data:
                self._meters[event.data["unit"]].update(event)
        self._driver, self._stop, self._inherits = driver, stop, True
        self.renew(driver)
        return dict(self._on_seats)

    def renew(self, driver: str) -> bool:
        """Note that a driver lives; returns whether it is still the run's."""
        if driver == self._driver:
            self._silence.end()
            self._seen_at, self._expired_at = time.time(), None
        return driver == self._driver

    def serve(self, driver: str, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method for the run's driver.

        Raises:
            TakenOverError: Another driver works on the run now.
        """
        self._check(driver)
        return getattr(self, method)(*arguments, **named)

    def answer(self) -> None:
        """Show a seat that this process lives."""

    def begin(self, units: Collection[str], begun: Collection[str]) -> None:
        """End the attempts at all units but some, and forget what earlier groups of trainings held.

        Args:
            units: Trainings of the group that the driver begins.
            begun: Those that an earlier driver has begun and that continue.
        """
        stay, self._inherits = {*begun, *(units if self._inherits else ())}, False
        for unit in {*self._attempts, *self._statuses, *self._meters} - {*begun}:
            self.end_attempt(unit)
            self._attempts.pop(unit, None)
            self._outcomes.pop(unit, None)
            self._statuses.pop(unit, None)
            if unit not in stay:  # what seats did for it while no driver lived counts
                del self._meters[unit]
        self._losses = 0

    def sync(self, method: str, *arguments: Any) -> Any:
        """Call a method of the board of sync points."""
        return getattr(self._syncs, method)(*arguments)

    def push(self, event: Event, attempt: str | None = None, box: str = TRAININGS) -> None:
        self._boxes.put(box, event)
        if event.type in ("workers_held", "workers_released"):
            self._meters[event.data["unit"]].update(event)
        elif event.unit is not None and attempt in (None, self._attempts.get(event.unit)):
            self._statuses[event.unit] = self._statuses[event.unit].updated(event)

    @ray.method(concurrency_group=POLLS)
    def wait(self, driver: str, box: str, seconds: float) -> list[Event]:
        """The first events of a box, once there is one; they stay until `drop`.

        Raises:
            TakenOverError: Another driver works on the run now.
        """
        self._check(driver)
        found = self._boxes.wait(box, seconds)
        self._check(driver)
        return found

    def wake(self, box: str) -> None:
        """End a `wait` now."""
        self._boxes.wake(box)

    def drop(self, box: str, count: int) -> None:
        """Remove the first events of a box, which the driver has stored."""
        for event in self._boxes.drop(box, count):
            if event.type == "workers_held" and "unit" in event.data:
                self._known_holds[event.data["hold"]] = event
            elif event.type == "workers_released":
                self._known_holds.pop(event.data["hold"], None)

    def begin_attempt(self, unit: str) -> str:
        self._attempts[unit] = attempt = uuid.uuid4().hex
        self._outcomes.pop(unit, None)
        self._on_seats.pop(unit, None)
        self._statuses[unit] = dataclasses.replace(
            self._statuses[unit],
            nodes=(),
            step=0,
            reports=0,
            held_at=None,
            exit_step=None,
            pulse_at=None,
            hung_seconds=0.0,
            card_gb=None,
        )
        return attempt

    def beat(self, unit: str, attempt: str, hung_seconds: float) -> None:
        if attempt == self._attempts.get(unit):
            self._statuses[unit] = dataclasses.replace(
                self._statuses[unit], pulse_at=time.time(), hung_seconds=hung_seconds
            )

    def set_actor(self, unit: str, attempt: str, actor: ActorHandle) -> None:
        if attempt == self._attempts.get(unit):
            self._actors[unit] = actor

    def actor(self, unit: str) -> ActorHandle | None:
        return self._actors.get(unit)

    def forget_actor(self, unit: str) -> None:
        self._actors.pop(unit, None)
        self._on_seats.pop(unit, None)

    def set_workers(
        self,
        unit: str,
        attempt: str,
        nodes: tuple[str, ...],
        group: PlacementGroup | None = None,
        seat: UnderWay | None = None,
    ) -> None:
        if attempt == self._attempts.get(unit):
            if group is not None:
                self._groups[unit] = group
            if seat is not None:
                self._on_seats[unit] = seat
            self._statuses[unit] = dataclasses.replace(self._statuses[unit], nodes=nodes, held_at=time.time())

    def end_attempt(self, unit: str) -> PlacementGroup | None:
        for hold in list(self._meters[unit].open):
            self.push(Event("workers_released", data={"hold": hold, "unit": unit}))
        self.forget_actor(unit)
        # Signs of life of this attempt say nothing about the next one. The node and the step say how this one ended.
        self._statuses[unit] = dataclasses.replace(self._statuses[unit], held_at=None, pulse_at=None, hung_seconds=0.0)
        return self._groups.pop(unit, None)

    def set_exit_step(self, unit: str, attempt: str, step: int) -> None:
        # The other workers of a gang end because they lost the first one: only the first one's step counts.
        if attempt == self._attempts.get(unit) and self._statuses[unit].exit_step is None:
            self._statuses[unit] = dataclasses.replace(self._statuses[unit], exit_step=step)

    def set_outcome(self, unit: str, attempt: str, outcome: bytes) -> None:
        if attempt == self._attempts.get(unit):
            self._outcomes[unit] = outcome

    def outcome(self, unit: str) -> bytes | None:
        return self._outcomes.get(unit)

    def statuses(self, units: Sequence[str]) -> dict[str, UnitStatus]:
        return {unit: self._statuses[unit] for unit in units}

    def end(self, attempt: str) -> None:
        self._ending.add(attempt)

    def is_ending(self, attempt: str) -> bool:
        return attempt in self._ending

    def count_loss(self) -> None:
        self._losses += 1

    def losses_per_hour(self) -> float:
        return loss_rate(self._losses, sum(sum(held.values()) for held in self.held().values()) / HOUR)

    def held(self) -> dict[str, dict[str, float]]:
        for meter in self._meters.values():
            meter.update(Event("heartbeat"))  # adds the worker-seconds of workers that are still held
        return {unit: meter.worker_seconds for unit, meter in self._meters.items()}

    def without_driver(self) -> Kept:
        """Decide what stays while no driver is seen, and end the rest; returns the decision."""
        now = self._clock()
        training = {unit for unit in self._on_seats if unit not in self._outcomes}
        decision = kept(
            self._silence.seconds(),
            None if self._expired_at is None else now - self._expired_at,
            stopped=self._is_stopped(),
            training=bool(training),
        )
        if decision.asks_to_end and self._expired_at is None:
            self._expired_at = now
            self._ending.update(self._on_seats[unit].attempt for unit in training)
        stays = training if decision.trainings else set()
        if decision.others is False:
            for unit in self._on_seats.keys() - stays:
                self.end_attempt(unit)
            self._end_seats({self._on_seats[unit].seat for unit in stays})
        return decision

    def leave(self) -> None:
        """End this process; Ray's list of actors shows that it was not killed."""
        ray.actor.exit_actor()

    def _check(self, driver: str) -> None:
        if driver != self._driver:
            raise TakenOverError("another driver has taken over the run; this one ends")

    def _is_stopped(self) -> bool:
        with contextlib.suppress(OSError):  # the storage of the stop file does not answer
            return self._stop.requested
        return False

    def _end_seats(self, but: Collection[str]) -> None:
        own = ray.get_runtime_context().get_actor_name()
        for name in named_actors(self._namespace):
            if name not in but and name != own:
                kill_named(name, self._namespace)

    def _watch(self) -> None:
        me = ray.get_runtime_context().current_actor
        while True:
            time.sleep(_WATCH_SECONDS)
            with contextlib.suppress(RayError):  # such as a head that does not answer: seats must not stay for that
                if not ray.get(me.without_driver.remote()).mailbox:
                    me.leave.remote()
                    return


def _again(hold: Event, since: float, ends: Mapping[str, float]) -> Event:
    """A hold of slots, from a later time on; with its end, if that has come."""
    end = ends.get(hold.data["hold"])
    return dataclasses.replace(hold, time=since, data=hold.data | ({} if end is None else {"until": end}))
