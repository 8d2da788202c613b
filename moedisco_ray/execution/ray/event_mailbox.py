"""Events on their way from the workers to the driver, through one small actor per run."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.core.metering import Meter
from moedisco_ray.policies.checkpointing import HOUR, loss_rate

_ASK_SECONDS = 60.0
"""Between two questions of a trainer for the losses that were seen."""


@dataclasses.dataclass(frozen=True)
class UnitStatus:
    """Where a unit was last seen.

    Attributes:
        nodes: Those of its workers.
        step: Steps made, as last reported by the newest attempt; 0: it has told of none.
        step_seconds: Seconds per step, as last reported by any attempt.
        stall: Seconds for which training stood still for the newest checkpoint.
        left_at: The step under way, counted from 0, when a worker of the newest attempt ended, as it says; None: none has said.
    """

    nodes: tuple[str, ...] = ()
    step: int = 0
    step_seconds: float | None = None
    stall: float = 0.0
    left_at: int | None = None

    @property
    def under_way(self) -> int | None:
        """The step under way, counted from 0: by a worker's own word, else as last reported; None: none is known."""
        return self.left_at if self.left_at is not None else self.step or None

    def after(self, event: Event) -> UnitStatus:
        """With one more event taken in."""
        data = event.data
        if event.type == "checkpoint":
            return dataclasses.replace(self, stall=data["stall"])
        if event.type != "progress":
            return self
        speed = data["tokens_per_second"] * data["step"] / data["tokens"] if data["tokens"] else 0.0
        return dataclasses.replace(self, step=data["step"], step_seconds=1 / speed if speed else self.step_seconds)


class _Mailbox:
    """Keeps events until the driver takes them, each unit's last word, and for how long it held workers.

    A worker that is cut off may outlive its attempt: of a unit, only what the newest attempt says is taken for its standing.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._attempts: dict[str, str] = {}
        self._outcomes: dict[str, Any] = {}
        self._meters: defaultdict[str, Meter] = defaultdict(Meter)
        self._whereabouts: defaultdict[str, UnitStatus] = defaultdict(UnitStatus)
        self._groups: dict[str, PlacementGroup] = {}
        self._controllers: dict[str, ActorHandle] = {}
        self._losses = 0

    def push(self, event: Event, attempt: str | None = None) -> None:
        self._events.append(event)
        if event.type in ("workers_held", "workers_released"):
            self._meters[event.data["unit"]].update(event)
        elif event.unit is not None and attempt in (None, self._attempts.get(event.unit)):
            self._whereabouts[event.unit] = self._whereabouts[event.unit].after(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def begin(self, unit: str) -> str:
        self._attempts[unit] = attempt = uuid.uuid4().hex
        self._outcomes.pop(unit, None)
        self._whereabouts[unit] = dataclasses.replace(self._whereabouts[unit], nodes=(), step=0, left_at=None)
        return attempt

    def control(self, unit: str, attempt: str, controller: ActorHandle) -> None:
        if attempt == self._attempts.get(unit):
            self._controllers[unit] = controller

    def controller(self, unit: str) -> ActorHandle | None:
        return self._controllers.get(unit)

    def place(self, unit: str, attempt: str, group: PlacementGroup, nodes: tuple[str, ...]) -> None:
        if attempt == self._attempts.get(unit):
            self._groups[unit] = group
            self._whereabouts[unit] = dataclasses.replace(self._whereabouts[unit], nodes=nodes)

    def end(self, unit: str) -> PlacementGroup | None:
        for hold in list(self._meters[unit].open):
            self.push(Event("workers_released", data={"hold": hold, "unit": unit}))
        self._controllers.pop(unit, None)
        return self._groups.pop(unit, None)

    def leave(self, unit: str, attempt: str, step: int) -> None:
        # The first of a gang to end is the one that the others lose.
        if attempt == self._attempts.get(unit) and self._whereabouts[unit].left_at is None:
            self._whereabouts[unit] = dataclasses.replace(self._whereabouts[unit], left_at=step)

    def finish(self, unit: str, attempt: str, outcome: Any) -> None:
        if attempt == self._attempts.get(unit):
            self._outcomes[unit] = outcome

    def outcome(self, unit: str) -> Any:
        return self._outcomes.get(unit)

    def whereabouts(self, unit: str) -> UnitStatus:
        return self._whereabouts[unit]

    def lose(self) -> None:
        self._losses += 1

    def losses_per_hour(self) -> float:
        return loss_rate(self._losses, sum(sum(held.values()) for held in self.held().values()) / HOUR)

    def held(self) -> dict[str, dict[str, float]]:
        for meter in self._meters.values():
            meter.update(Event("heartbeat"))    # what is held is counted up to now
        return {unit: meter.worker_seconds for unit, meter in self._meters.items()}


class EventMailbox:
    """The driver's end.

    Attributes:
        handle: What workers get; it pickles.
        check: Raises what went wrong with handing events on, a full disk say. Who waits for workers asks now and then.
    """

    def __init__(self, handle: ActorHandle, check: Callable[[], None]) -> None:
        self.handle = handle
        self.check = check

    def begin(self, unit: str) -> str:
        """Forget what an earlier attempt of the unit returned, and where it was; returns by what the new one is known."""
        attempt: str = ray.get(self.handle.begin.remote(unit))
        return attempt

    def end(self, unit: str) -> None:
        """Free what an attempt still holds. A worker that dies while its group starts leaves the group behind."""
        group = ray.get(self.handle.end.remote(unit))
        if group is not None:
            remove_placement_group(group)

    def kill(self, unit: str) -> None:
        """End an attempt at a unit, if one is under way, whatever its workers are doing, or waiting for."""
        controller = ray.get(self.handle.controller.remote(unit))
        if controller is not None:
            ray.kill(controller)

    def lose(self) -> None:
        """Count a loss that cost work."""
        ray.get(self.handle.lose.remote())

    def whereabouts(self, unit: str) -> UnitStatus:
        """Where the unit was last seen."""
        found: UnitStatus = ray.get(self.handle.whereabouts.remote(unit))
        return found

    def losses_per_hour(self) -> float:
        """Losses that cost work, per worker-hour, as the policy reckons from what was seen of all units."""
        found: float = ray.get(self.handle.losses_per_hour.remote())
        return found

    def outcome(self, unit: str) -> Any:
        """What the unit's worker returned, raised here if it was an error of ours; None if it never came to an end."""
        outcome = ray.get(self.handle.outcome.remote(unit))
        if isinstance(outcome, MoeDiscoError):
            raise outcome
        return outcome

    def held(self) -> dict[str, dict[str, float]]:
        """Worker-seconds of each unit up to now, over attempts, by what the meter calls the machines."""
        found: dict[str, dict[str, float]] = ray.get(self.handle.held.remote())
        return found


@contextlib.contextmanager
def relay(emit: Emit, interval: float = 0.2) -> Iterator[EventMailbox]:
    """Hand every event that workers push to `emit`, in order, from one thread, until the block ends.

    Args:
        emit: Receives the events.
        interval: Seconds between two looks.

    Raises:
        Exception: What `emit` raised, unless the block raised.
    """
    # Beside the driver: on a spot machine it would take the run with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()
    try:
        with pumped(lambda: ray.get(mailbox.take.remote()), emit, interval) as check:
            yield EventMailbox(mailbox, check)
    finally:
        ray.kill(mailbox)


@contextlib.contextmanager
def pumped(take: Callable[[], list[Event]], emit: Emit, interval: float) -> Iterator[Callable[[], None]]:
    """Hand what `take` returns to `emit`, from one thread, until the block ends, however it does; then once more.

    Args:
        take: Returns the events since it was last asked.
        emit: Receives them.
        interval: Seconds between two looks.

    Yields:
        What raises the error that ended the thread, if one did.

    Raises:
        Exception: The same, when the block ends; unless that raised.
    """
    ended = threading.Event()

    def pump() -> None:
        last = False
        while not last:
            last = ended.wait(interval)
            for event in take():
                emit(event)

    with ThreadPoolExecutor(1, thread_name_prefix="event-relay") as thread:
        pumping = thread.submit(pump)

        def check() -> None:
            if pumping.done():
                pumping.result()

        try:
            yield check
        finally:
            ended.set()
            wait([pumping])
        pumping.result()


def emitter(handle: ActorHandle, attempt: str) -> Emit:
    """An `Emit` for a worker of an attempt: fire and forget."""

    def emit(event: Event) -> None:
        handle.push.remote(event, attempt)

    return emit


def losses_seen(handle: ActorHandle, known: float, clock: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """For a worker: losses per worker-hour as the run has seen them by now, which no training waits for.

    Args:
        handle: Of the run's mailbox.
        known: What was known when the worker began.
        clock: Seconds.
    """
    asked = clock()
    answers: list[Any] = []

    def latest() -> float:
        nonlocal known, asked
        if answers and ray.wait(answers, timeout=0)[0]:
            with contextlib.suppress(RayActorError):    # of a driver that is out of reach others hear
                known = ray.get(answers.pop())
        if not answers and clock() - asked >= _ASK_SECONDS:
            asked = clock()
            answers.append(handle.losses_per_hour.remote())
        return known

    return latest
