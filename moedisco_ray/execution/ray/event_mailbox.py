"""The driver's side of the run's mailbox, the actor that carries the workers' events."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError, RayError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moedisco_ray.core.errors import MoeDiscoError, RunError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.run_work import unpickled
from moedisco_ray.execution.ray.mailbox_actor import POLLS, TRAININGS, MailboxActor, TakenOverError, UnderWay, mark_of
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.execution.ray.worker_mailbox import STOP_SECONDS, attempt_emitter

_POLL_SECONDS = 10.0
"""Maximum time for which the actor holds a call for events back, in seconds."""
_MOST_POLLS = 8
"""Number of calls that the actor holds back at once; those of a dead driver are among them for some seconds."""
_RENEW_SECONDS = 1.0
"""Interval between two signs of life, in seconds."""
_ANSWER_SECONDS = 10.0
"""Maximum time to wait for the answer to a sign of life, in seconds."""
_LEAVE_SECONDS = 5.0
"""Seconds in which an actor that is asked to end must do so."""
_STARTS = 3


@dataclasses.dataclass(frozen=True)
class RunMailbox:
    """The mailbox actor of a run, and the driver that it serves.

    Attributes:
        handle: The actor.
        namespace: Ray namespace of the run's actors; empty if they end with this driver.
        driver: Id of this driver.
        taken_over: Set once another driver works on the run. Then this driver ends, and leaves the run's seats alone.
        lost: Set once the actor has ended. Then this driver ends, and the seats save checkpoints and end by themselves.
    """

    handle: ActorHandle
    namespace: str = ""
    driver: str = ""
    taken_over: threading.Event = dataclasses.field(default_factory=threading.Event, compare=False)
    lost: threading.Event = dataclasses.field(default_factory=threading.Event, compare=False)

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the actor as the run's driver, and wait for the result.

        Raises:
            TakenOverError: Another driver works on the run now.
            RunError: The actor has ended.
        """
        with self._noting():
            return ray.get(self.handle.serve.remote(self.driver, method, *arguments, **named))

    def events(self, box: str, seconds: float) -> list[Event]:
        """The first events of a box, once there is one; they stay until they are dropped.

        Raises:
            RunError: As from `call`.
        """
        with self._noting():
            found: list[Event] = ray.get(self.handle.wait.remote(self.driver, box, seconds))
        return found

    def renew(self) -> None:
        """Show the mailbox that this driver lives, so that it keeps the seats.

        Raises:
            RunError: As from `call`.
            GetTimeoutError: The mailbox does not answer.
        """
        with self._noting():
            if self.namespace and not ray.get(self.handle.renew.remote(self.driver), timeout=_ANSWER_SECONDS):
                self.taken_over.set()
        self.check()

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew it every second until the block ends, in a thread that waits for nothing else."""
        ended = threading.Event()

        def renew_regularly() -> None:
            while not ended.wait(_RENEW_SECONDS):
                with contextlib.suppress(RayError, RunError):  # others check for them
                    self.renew()

        thread = threading.Thread(target=renew_regularly, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def check(self) -> None:
        """Raise an error if this driver must not continue.

        Raises:
            TakenOverError: Another driver works on the run now.
            RunError: The actor has ended.
        """
        if self.taken_over.is_set():
            raise TakenOverError("another driver has taken over the run; this one ends")
        if self.lost.is_set():
            raise RunError("the run's mailbox, an actor on the driver's machine, was killed; run the command again")

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except TakenOverError:  # Ray's form of it has a traceback as its text
            self.taken_over.set()
            self.check()
        except ActorDiedError:
            self.lost.set()
            self.check()


class EventMailbox:
    """The driver's side of the mailbox actor.

    Attributes:
        mailbox: The actor, as this driver calls it.
        handle: The actor, to be passed to workers.
        check: Raises the error that stopped the forwarding of events, such as a full disk. Code that waits for workers
            calls it regularly.
        emitter: An `Emit` for workers on any node, whose events are not those of a training.
    """

    def __init__(self, mailbox: RunMailbox, check: Callable[[], None], box: str = TRAININGS) -> None:
        self.mailbox = mailbox
        self.handle = mailbox.handle
        self.check = check
        self.emitter = attempt_emitter(mailbox.handle, "", box)

    def begin(self, units: Collection[str], begun: Collection[str]) -> None:
        """Begin a group of trainings; the mailbox forgets all others.

        Args:
            units: Names of the trainings.
            begun: Names of those that an earlier driver has begun.
        """
        self.mailbox.call("begin", list(units), list(begun))

    def push(self, event: Event) -> None:
        """Emit an event of the driver itself, in order with those of the workers."""
        self.mailbox.call("push", event)

    def begin_attempt(self, unit: str) -> str:
        """Start a new attempt at a unit and return its id; clears the outcome and nodes of the earlier attempt."""
        attempt: str = self.mailbox.call("begin_attempt", unit)
        return attempt

    def end_attempt(self, unit: str) -> None:
        """Release the attempt's metered slots, and its placement group if a worker died during start-up.

        An attempt that another driver has taken over continues.
        """
        if self.mailbox.taken_over.is_set():
            return
        group = self.mailbox.call("end_attempt", unit)
        if group is not None:
            remove_placement_group(group)

    def kill_attempt(self, unit: str) -> None:
        """End the attempt at a unit, if one is under way, whatever its workers do or wait for."""
        actor = self.mailbox.call("actor", unit)
        if actor is not None:
            ray.kill(actor)

    def set_actor(self, unit: str, attempt: str, actor: ActorHandle) -> None:
        """Register the process of an attempt, so that `kill_attempt` can kill it."""
        self.mailbox.call("set_actor", unit, attempt, actor)

    def forget_actor(self, unit: str) -> None:
        """Unregister the process of an attempt that has ended its work: the next one may have it."""
        self.mailbox.call("forget_actor", unit)

    def start_work(self, unit: str, stage: str, under_way: UnderWay) -> None:
        """Note that an attempt has its seat, and meter the seat from now until `end_attempt`.

        Args:
            unit: Name of the training.
            stage: Stage of the training.
            under_way: The attempt and its seat.
        """
        hold = {"hold": uuid.uuid4().hex[:12], "unit": unit, "pool": under_way.pool, "workers": under_way.slots}
        self.push(Event("workers_held", stage, data=hold))
        self.mailbox.call("set_workers", unit, under_way.attempt, (under_way.node,), seat=under_way)

    def count_loss(self) -> None:
        """Count that workers were lost before they saved a final checkpoint; `losses_per_hour` uses this count."""
        self.mailbox.call("count_loss")

    def status(self, unit: str) -> UnitStatus:
        """The last known state of a unit."""
        return self.statuses([unit])[unit]

    def statuses(self, units: Sequence[str]) -> dict[str, UnitStatus]:
        """The last known states of several units, by name, requested in one message."""
        found: dict[str, UnitStatus] = self.mailbox.call("statuses", units)
        return found

    def losses_per_hour(self) -> float:
        """Number of lost workers per worker-hour over all units, as `policies.checkpointing` estimates it."""
        found: float = self.mailbox.call("losses_per_hour")
        return found

    def outcome(self, unit: str) -> Any:
        """What the unit's worker returned; None if it did not return.

        An error of this package is raised instead of returned.
        """
        pickled: bytes | None = self.mailbox.call("outcome", unit)
        outcome = None if pickled is None else unpickled(pickled)
        if isinstance(outcome, MoeDiscoError):
            raise outcome
        return outcome

    def held(self) -> dict[str, dict[str, float]]:
        """Worker-seconds held so far, over all attempts, by unit and pool key."""
        found: dict[str, dict[str, float]] = self.mailbox.call("held")
        return found


@contextlib.contextmanager
def private_mailbox() -> Iterator[RunMailbox]:
    """Start a mailbox that ends with the block, or with this driver."""
    actor = _start()
    try:
        yield RunMailbox(actor)
    finally:
        end_mailbox(actor)


def run_mailbox(
    name: str, namespace: str, stop: StopFile, logged: Sequence[Event] = ()
) -> tuple[RunMailbox, dict[str, UnderWay]]:
    """Take over the mailbox that an earlier driver of the run has left, or start one.

    Args:
        name: Name of the actor.
        namespace: Ray namespace of the run's actors.
        stop: File that, once it exists, ends the run's seats even if no driver does.
        logged: The newest events in the run's log.

    Returns:
        The mailbox, and the trainings on seats that an earlier driver has begun, by unit.

    Raises:
        RunError: The mailbox does not start.
    """
    driver = uuid.uuid4().hex
    for _ in range(_STARTS):
        actor = _start(name, namespace)
        with contextlib.suppress(RayActorError):  # its lease was over, and it ended at this moment
            found: dict[str, UnderWay] = ray.get(actor.take_over.remote(driver, stop, [*map(mark_of, logged)]))
            return RunMailbox(actor, namespace, driver), found
    raise RunError(f"the actor {name} does not start; see the Ray logs")


def end_mailbox(actor: ActorHandle) -> None:
    """End a mailbox the regular way, or at once if it does not answer."""
    if not ray.wait([actor.leave.remote()], timeout=_LEAVE_SECONDS)[0]:
        ray.kill(actor)


def _start(name: str | None = None, namespace: str = "") -> ActorHandle:
    # On the driver's node: an actor on a spot machine would end the run when the machine is lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    named = {"name": name, "namespace": namespace, "lifetime": "detached", "get_if_exists": True} if namespace else {}
    # Ray's list of tasks is in the head's memory, and would hold little else.
    remote = ray.remote(num_cpus=0, concurrency_groups={POLLS: _MOST_POLLS}, enable_task_events=False)(MailboxActor)
    actor: ActorHandle = remote.options(scheduling_strategy=here, **named).remote(namespace)
    return actor


@contextlib.contextmanager
def open_mailbox(
    emit: Emit, mailbox: RunMailbox | None = None, box: str = TRAININGS, interval: float = 0.2
) -> Iterator[EventMailbox]:
    """Call `emit` with the events of a box of a mailbox, in order, from one thread, until the block ends.

    Args:
        emit: Receives the events.
        mailbox: The run's mailbox; None to start one for the block.
        box: Name of the box.
        interval: Minimum seconds between two calls for events.

    Yields:
        The mailbox.

    Raises:
        Exception: The error that `emit` raised, unless the block raised one.
    """
    with contextlib.ExitStack() as stack:
        found = mailbox or stack.enter_context(private_mailbox())
        with forwarding(
            lambda: found.events(box, _POLL_SECONDS),
            emit,
            interval,
            lambda count: found.call("drop", box, count),
            lambda: found.handle.wake.remote(box),
        ) as check:
            yield EventMailbox(found, check, box)


@contextlib.contextmanager
def forwarding(
    take: Callable[[], list[Event]],
    emit: Emit,
    interval: float,
    drop: Callable[[int], object] = lambda _count: None,
    wake: Callable[[], object] = lambda: None,
) -> Iterator[Callable[[], None]]:
    """Until the block ends, call `emit` in a thread with each event from `take`; at the end, forward the rest.

    Args:
        take: Waits for events, and returns the first of them.
        emit: Receives the events.
        interval: Minimum seconds between two calls of `take`.
        drop: Removes a number of events that `emit` has received from those that `take` returns.
        wake: Ends the wait of `take`, without events if there are none.

    Yields:
        A function that raises the error that ended the thread, if one did.

    Raises:
        Exception: The error that ended the thread, unless the block itself raised one.
    """
    ended = threading.Event()

    def forward() -> None:
        last, events = False, list[Event]()
        while events or not last:
            last = ended.wait(interval)
            if last:
                wake()
            events = take()
            for event in events:
                emit(event)
            if events:
                drop(len(events))

    with ThreadPoolExecutor(1, thread_name_prefix="event-mailbox") as thread:
        forwarder = thread.submit(forward)

        def check() -> None:
            if forwarder.done():
                forwarder.result()

        try:
            yield check
        finally:
            ended.set()
            wake()
            wait([forwarder])
        forwarder.result()


@contextlib.contextmanager
def relaying_stops(mailbox: EventMailbox, attempt: str, stop_files: Sequence[StopFile]) -> Iterator[None]:
    """Watch stop files on the driver's machine until the block ends; if one appears, ask the attempt to end."""
    ended = threading.Event()

    def relay() -> None:
        while not ended.wait(STOP_SECONDS):
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
