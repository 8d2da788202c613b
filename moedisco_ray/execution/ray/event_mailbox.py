"""Delivery of events from the workers to the driver, through one small actor per run."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.run_work import unpickled
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.checkpointing import HOUR, loss_rate

_LOSS_RATE_SECONDS = 60.0
"""Interval at which a worker reads the run's rate of lost workers, in seconds."""
_STOP_SECONDS = 1.0
"""Interval at which the driver and each worker check for a stop request, in seconds."""


class MailboxActor:
    """Stores events until the driver takes them, and each unit's status, outcome and held worker-seconds.

    A worker that lost its connection may outlive its attempt: only the newest attempt changes the status and outcome of
    a unit.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._attempts: dict[str, str] = {}
        self._outcomes: dict[str, bytes] = {}  # pickled: their classes would bring torch into this process
        self._meters: defaultdict[str, Meter] = defaultdict(Meter)
        self._statuses: defaultdict[str, UnitStatus] = defaultdict(UnitStatus)
        self._groups: dict[str, PlacementGroup] = {}
        self._actors: dict[str, ActorHandle] = {}
        self._losses = 0
        self._ending: set[str] = set()

    def push(self, event: Event, attempt: str | None = None) -> None:
        self._events.append(event)
        if event.type in ("workers_held", "workers_released"):
            self._meters[event.data["unit"]].update(event)
        elif event.unit is not None and attempt in (None, self._attempts.get(event.unit)):
            self._statuses[event.unit] = self._statuses[event.unit].updated(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def begin_attempt(self, unit: str) -> str:
        self._attempts[unit] = attempt = uuid.uuid4().hex
        self._outcomes.pop(unit, None)
        self._statuses[unit] = dataclasses.replace(
            self._statuses[unit],
            nodes=(),
            step=0,
            reports=0,
            held_at=None,
            exit_step=None,
            pulse_at=None,
            hung_seconds=0.0,
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

    def set_workers(self, unit: str, attempt: str, nodes: tuple[str, ...], group: PlacementGroup | None = None) -> None:
        if attempt == self._attempts.get(unit):
            if group is not None:
                self._groups[unit] = group
            self._statuses[unit] = dataclasses.replace(self._statuses[unit], nodes=nodes, held_at=time.time())

    def end_attempt(self, unit: str) -> PlacementGroup | None:
        for hold in list(self._meters[unit].open):
            self.push(Event("workers_released", data={"hold": hold, "unit": unit}))
        self._actors.pop(unit, None)
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


class EventMailbox:
    """The driver's side of the mailbox actor.

    Attributes:
        handle: The actor, to be passed to workers.
        check: Raises the error that stopped the forwarding of events, such as a full disk. Code that waits for workers
            calls it regularly.
    """

    def __init__(self, handle: ActorHandle, check: Callable[[], None]) -> None:
        self.handle = handle
        self.check = check

    def push(self, event: Event) -> None:
        """Emit an event of the driver itself, in order with those of the workers."""
        ray.get(self.handle.push.remote(event))

    def begin_attempt(self, unit: str) -> str:
        """Start a new attempt at a unit and return its id; clears the outcome and nodes of the earlier attempt."""
        attempt: str = ray.get(self.handle.begin_attempt.remote(unit))
        return attempt

    def end_attempt(self, unit: str) -> None:
        """Release the attempt's metered slots, and its placement group if a worker died during start-up."""
        group = ray.get(self.handle.end_attempt.remote(unit))
        if group is not None:
            remove_placement_group(group)

    def kill_attempt(self, unit: str) -> None:
        """End the attempt at a unit, if one is under way, whatever its workers do or wait for."""
        actor = ray.get(self.handle.actor.remote(unit))
        if actor is not None:
            ray.kill(actor)

    def set_actor(self, unit: str, attempt: str, actor: ActorHandle) -> None:
        """Register the process of an attempt, so that `kill_attempt` can kill it."""
        ray.get(self.handle.set_actor.remote(unit, attempt, actor))

    def forget_actor(self, unit: str) -> None:
        """Unregister the process of an attempt that has ended its work: the next one may have it."""
        ray.get(self.handle.forget_actor.remote(unit))

    def start_work(self, unit: str, attempt: str, *, stage: str, pool: str, node: str) -> None:
        """Note that an attempt has its seat, and meter the seat from now until `end_attempt`.

        Args:
            unit: Name of the training.
            attempt: Id of the attempt.
            stage: Stage of the training.
            pool: Key of the seat's pool in the meter.
            node: Id of the seat's node.
        """
        self.push(
            Event("workers_held", stage, data={"hold": uuid.uuid4().hex[:12], "unit": unit, "pool": pool, "workers": 1})
        )
        ray.get(self.handle.set_workers.remote(unit, attempt, (node,)))

    def count_loss(self) -> None:
        """Count that workers were lost before they saved a final checkpoint; `losses_per_hour` uses this count."""
        ray.get(self.handle.count_loss.remote())

    def status(self, unit: str) -> UnitStatus:
        """The last known state of a unit."""
        return self.statuses([unit])[unit]

    def statuses(self, units: Sequence[str]) -> dict[str, UnitStatus]:
        """The last known states of several units, by name, requested in one message."""
        found: dict[str, UnitStatus] = ray.get(self.handle.statuses.remote(units))
        return found

    def losses_per_hour(self) -> float:
        """Number of lost workers per worker-hour over all units, as `policies.checkpointing` estimates it."""
        found: float = ray.get(self.handle.losses_per_hour.remote())
        return found

    def outcome(self, unit: str) -> Any:
        """What the unit's worker returned; None if it did not return.

        An error of this package is raised instead of returned.
        """
        pickled: bytes | None = ray.get(self.handle.outcome.remote(unit))
        outcome = None if pickled is None else unpickled(pickled)
        if isinstance(outcome, MoeDiscoError):
            raise outcome
        return outcome

    def held(self) -> dict[str, dict[str, float]]:
        """Worker-seconds held so far, over all attempts, by unit and pool key."""
        found: dict[str, dict[str, float]] = ray.get(self.handle.held.remote())
        return found


@contextlib.contextmanager
def open_mailbox(emit: Emit, interval: float = 0.2) -> Iterator[EventMailbox]:
    """Yield a mailbox, and call `emit` with its events, in order, from one thread, until the block ends.

    Args:
        emit: Receives the events.
        interval: Seconds between two polls of the actor.

    Raises:
        Exception: The error that `emit` raised, unless the block raised one.
    """
    # On the driver's node: an actor on a spot machine would end the run when the machine is lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Five polls per second would fill Ray's list of tasks, which is in the head's memory.
    actor = ray.remote(num_cpus=0, scheduling_strategy=here, enable_task_events=False)(MailboxActor).remote()
    try:
        with forwarding(lambda: ray.get(actor.take.remote()), emit, interval) as check:
            yield EventMailbox(actor, check)
    finally:
        ray.kill(actor)


@contextlib.contextmanager
def forwarding(take: Callable[[], list[Event]], emit: Emit, interval: float) -> Iterator[Callable[[], None]]:
    """Until the block ends, call `emit` in a thread with each event from `take`; at the end, forward the rest.

    Args:
        take: Returns the events since its last call.
        emit: Receives the events.
        interval: Seconds between two calls of `take`.

    Yields:
        A function that raises the error that ended the thread, if one did.

    Raises:
        Exception: The error that ended the thread, unless the block itself raised one.
    """
    ended = threading.Event()

    def forward() -> None:
        last = False
        while not last:
            last = ended.wait(interval)
            for event in take():
                emit(event)

    with ThreadPoolExecutor(1, thread_name_prefix="event-mailbox") as thread:
        forwarder = thread.submit(forward)

        def check() -> None:
            if forwarder.done():
                forwarder.result()

        try:
            yield check
        finally:
            ended.set()
            wait([forwarder])
        forwarder.result()


@dataclasses.dataclass(frozen=True)
class _AttemptEmitter:
    handle: ActorHandle
    attempt: str

    def __call__(self, event: Event) -> None:
        self.handle.push.remote(event, self.attempt)


def attempt_emitter(handle: ActorHandle, attempt: str) -> Emit:
    """An `Emit` for a worker of an attempt; it does not wait for delivery."""
    return _AttemptEmitter(handle, attempt)


@contextlib.contextmanager
def relaying_stops(mailbox: EventMailbox, attempt: str, stop_files: Sequence[StopFile]) -> Iterator[None]:
    """Watch stop files on the driver's machine until the block ends; if one appears, ask the attempt to end."""
    ended = threading.Event()

    def relay() -> None:
        while not ended.wait(_STOP_SECONDS):
            if any(stop.requested for stop in stop_files):
                mailbox.handle.end.remote(attempt)
                return

    thread = threading.Thread(target=relay, name="stops", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def stop_reader(handle: ActorHandle, attempt: str) -> Callable[[], bool]:
    """Return a check, which does not block training, of whether the mailbox asked an attempt to end.

    Args:
        handle: The run's mailbox actor.
        attempt: Id of the attempt.
    """
    ending, asked_at = False, float("-inf")
    answers: list[Any] = []

    def requested() -> bool:
        nonlocal ending, asked_at
        if answers and ray.wait(answers, timeout=0)[0]:
            with contextlib.suppress(RayActorError):  # the mailbox is gone; sending the next event ends the worker
                ending = ray.get(answers.pop()) or ending
        if not answers and not ending and time.monotonic() - asked_at >= _STOP_SECONDS:
            asked_at = time.monotonic()
            answers.append(handle.is_ending.remote(attempt))
        return ending

    return requested


def loss_rate_reader(
    handle: ActorHandle, known: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[], float]:
    """A function that returns the rate of lost workers (per worker-hour) in the run, without blocking training.

    Args:
        handle: The run's mailbox actor.
        known: The rate when the worker began.
        clock: Returns the current time in seconds.
    """
    asked_at = clock()
    answers: list[Any] = []

    def latest() -> float:
        nonlocal known, asked_at
        if answers and ray.wait(answers, timeout=0)[0]:
            with contextlib.suppress(RayActorError):  # the mailbox is gone; sending the next event ends the worker
                known = ray.get(answers.pop())
        if not answers and clock() - asked_at >= _LOSS_RATE_SECONDS:
            asked_at = clock()
            answers.append(handle.losses_per_hour.remote())
        return known

    return latest
