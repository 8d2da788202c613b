"""Seats: long-lived actors that each hold one slot of a pool and run one piece of work after the other.

A process that has imported torch and holds its GPU takes milliseconds to begin the next sub-model; a new one takes
seconds, and a Ray Train run with one worker starts five more processes on the head node. So a run starts a seat when
work needs a slot, and keeps it for what follows. A seat whose work failed is ended: nothing of its process remains.

The seats of a run outlive its driver: the next one finds the trainings on them. Until then, the run's mailbox keeps
them, and ends with them; see `policies.leasing`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from moedisco_ray.core.config import AnyPool, Pool
from moedisco_ray.execution.cards import CHECK_SECONDS, hanging_card
from moedisco_ray.execution.ray import ray_internals
from moedisco_ray.execution.ray.card_check import check_card
from moedisco_ray.execution.ray.event_mailbox import RunMailbox
from moedisco_ray.execution.ray.mailbox_actor import UnderWay
from moedisco_ray.execution.ray.named_actors import kill_named, mailbox_name, named_actors, number_of
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.execution.ray.seat_actor import Seat as SeatActor
from moedisco_ray.policies.setting_aside import Place

T = TypeVar("T")

IDLE_SECONDS = 30.0
"""Seconds for which a run keeps a seat without work: longer than most pauses between stages, but short for another run
that waits."""
POLL_SECONDS = 1.0
"""Interval at which idle seats are checked, and ended if they are no longer needed, in seconds."""
_ANSWER_SECONDS = 5.0
"""Seconds in which an idle seat must answer a check before it gets work, or end when it is asked to."""


class PlaceAsideError(Exception):
    """Ray gave a seat a card that the run leaves out for a while."""


@dataclasses.dataclass
class Seat:
    """A process that holds a slot of a pool, and runs work there.

    Attributes:
        actor: The seat's process; killing it frees the slot.
        name: The seat's name in Ray.
        pool: Node type whose slot the seat holds.
        aside: Receives what is found out about the seat's GPU.
        place: Where the seat is; empty until it has a slot.
        idle_since: Time at which the seat's last work ended; infinite while the seat works.
        checked: Whether the seat's GPU was found to work.
        parked: Whether the seat only keeps Ray from giving its card to another one.
        check: Raises an error if this driver must not wait for the seat any longer.
    """

    actor: ActorHandle
    name: str
    pool: Pool
    aside: NodesAside
    place: Place = dataclasses.field(default_factory=Place)
    idle_since: float = float("inf")
    checked: bool = False
    parked: bool = False
    check: Callable[[], None] = lambda: None
    _answer: Any = None

    @property
    def node_id(self) -> str:
        """Id of the seat's node; empty until the seat has a slot."""
        return self.place.node_id

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the seat has its slot, or until a timeout; returns whether it has a slot.

        Raises:
            PlaceAsideError: The run leaves the seat's card out.
            RayError: The seat's process ended, or Ray cannot start it.
        """
        while not self.locate(POLL_SECONDS if seconds is None else seconds):
            if seconds is not None:
                return False
            self.check()
        if self.aside.has(self.pool, self.place):
            self.parked = True
            raise PlaceAsideError(str(self.place))
        return True

    def locate(self, seconds: float | None = None) -> bool:
        """Find out where the seat is; returns False if it gets no slot in time."""
        self._answer = self._answer or self.actor.place.remote()
        try:
            self.place = Place(*ray.get(self._answer, timeout=seconds))
        except GetTimeoutError:
            return False
        self._answer = None
        return True

    def run(self, name: str, function: Callable[[], T], attempt: str = "") -> T:
        """Call a function in the seat's process, once its GPU has been found to work.

        Ray's list of tasks shows the call as `name`.

        Args:
            name: Name of the work.
            function: The function.
            attempt: Id with which a later driver can wait for the end of the function; see `join`.

        Raises:
            CardError: The check of the GPU does not end.
            RayError: The function raised an error, or the seat's process ended. Its cause is a `CardError` if torch
                cannot use the GPU.
        """
        if self.pool.gpu and not self.checked:
            self._check_card(f"{self.pool.path}.gpu")
        call = self.actor.run.options(name=name, enable_task_events=True)
        found: T = self._result(call.remote(function, name, attempt))
        return found

    def join(self, attempt: str) -> bool:
        """Wait for the end of a function that an earlier driver has called; returns False if it never began.

        Raises:
            RayError: As from `run`.
        """
        found: bool = self._result(self.actor.join.remote(attempt))
        return found

    def end(self) -> None:
        """End the seat's process, whatever it does or waits for."""
        ray.kill(self.actor)

    def _result(self, task: Any) -> Any:
        while not ray.wait([task], timeout=POLL_SECONDS)[0]:
            self.check()
        return ray.get(task)

    def _check_card(self, field: str) -> None:
        try:
            ray.get(self.actor.check.remote(functools.partial(check_card, field)), timeout=CHECK_SECONDS)
        except GetTimeoutError as error:
            raise hanging_card(field, self.pool.gpu, self.node_id) from error
        self.checked = True
        self.aside.found_working()


class Seats:
    """Starts a run's seats, lends them to work, and ends them. Several threads may use this object at the same time.

    Args:
        run: Prefix of the actors' names.
        clock: Returns the current time in seconds.
        mailbox: The run's mailbox, which keeps the seats if this driver dies; None: they end with it.
        under_way: Trainings that an earlier driver has begun, by unit.

    Attributes:
        aside: Nodes and cards on which no seat starts.
    """

    def __init__(
        self,
        run: str,
        clock: Callable[[], float] = time.monotonic,
        mailbox: RunMailbox | None = None,
        under_way: Mapping[str, UnderWay] | None = None,
    ) -> None:
        self._run = run
        self._clock = clock
        self._mailbox = mailbox
        self._namespace = mailbox.namespace if mailbox is not None else f"{run}-{uuid.uuid4().hex}"
        self._numbers = itertools.count(1)
        self._under_way = dict(under_way or {})
        self.aside = NodesAside()
        self._lock = threading.Lock()
        self._idle: list[Seat] = []
        self._parked: list[Seat] = []
        self._busy: list[Seat] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll_regularly, name="seats", daemon=True)

    def __enter__(self) -> Self:
        if self._mailbox is not None:
            left = named_actors(self._namespace)
            self._numbers = itertools.count(1 + max(map(number_of, left), default=0))
            self._claim()
            for name in {*left} - {each.seat for each in self._under_way.values()} - {mailbox_name(self._run)}:
                kill_named(name, self._namespace)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._is_taken_over:
            return
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self._end_all)
            self.end_under_way()
            self.end_idle()

    @contextlib.contextmanager
    def taken(self, pool: Pool, avoided: Collection[str] = ()) -> Iterator[Seat]:
        """Lend a seat of a node type to the block: an idle seat, or a new one, which may still wait for its slot.

        The seat becomes idle at the end of the block, or is ended if the block raises an error.

        Args:
            pool: The node type.
            avoided: Ids of nodes on which the seat must not be.
        """
        self.end_under_way()
        seat = self._take_idle(pool, avoided) or self._start(pool, avoided)
        with self.lent(seat):
            yield seat

    @contextlib.contextmanager
    def lent(self, seat: Seat) -> Iterator[None]:
        """Let a seat become idle at the end of the block, or end it if the block raises an error."""
        with self._lock:
            self._busy = [*(each for each in self._busy if each is not seat), seat]
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._end_or_park, seat)
            yield
            on_failure.pop_all()
        seat.idle_since = self._clock()
        with self._lock:
            self._busy = [each for each in self._busy if each is not seat]
            self._idle.append(seat)

    def claimed(self, wanted: Mapping[str, str], pools: Mapping[str, Pool]) -> dict[str, tuple[Seat, str]]:
        """The seats that do the work of an earlier driver, which this one has to wait for; the others are ended.

        Args:
            wanted: Where the checkpoints of each training are, by unit.
            pools: Node types, by key.

        Returns:
            Seat and id of the attempt, by unit.
        """
        found: dict[str, tuple[Seat, str]] = {}
        for unit, each in list(self._under_way.items()):
            if wanted.get(unit) != each.checkpoints or each.pool not in pools:
                continue
            with contextlib.suppress(ValueError):  # the seat has ended
                actor = ray.get_actor(each.seat, self._namespace)
                place = Place(each.node)
                seat = Seat(actor, each.seat, pools[each.pool], self.aside, place, checked=True, check=self._check)
                found[unit] = seat, each.attempt
                with self._lock:
                    self._busy.append(seat)
            del self._under_way[unit]
        self.end_under_way()
        return found

    def idle(self, tag: str) -> int:
        """Number of slots with a tag whose actor has no work now."""
        with self._lock:
            return sum(seat.pool.slots for seat in (*self._idle, *self._parked) if seat.pool.resource == tag)

    def end_idle(self, where: Callable[[Seat], bool] = lambda _seat: True) -> None:
        """End the seats without work that fulfil a condition, and wait for their ends."""
        with self._lock:
            matching = [seat for seat in self._idle if where(seat)]
            self._idle = [seat for seat in self._idle if seat not in matching]
        if self._is_taken_over:
            return
        leaving = {seat.actor.leave.remote(): seat for seat in matching}
        staying = list(leaving)
        try:
            if staying:
                _, staying = ray.wait(staying, num_returns=len(staying), timeout=_ANSWER_SECONDS)
        finally:
            for each in staying:
                leaving[each].end()

    def end_parked(self, where: Callable[[Seat], bool]) -> None:
        """End the seats that keep Ray from giving their cards to others, if they fulfil a condition."""
        matching = [*filter(where, [*self._parked])]
        with self._lock:
            self._parked = [seat for seat in self._parked if seat not in matching]
        for seat in matching:
            self._end(seat)

    @property
    def has_under_way(self) -> bool:
        """Whether seats do the work of an earlier driver, which nothing waits for yet."""
        return bool(self._under_way)

    def end_under_way(self) -> None:
        """End the seats that do the work of an earlier driver, which nothing waits for."""
        with self._lock:
            left, self._under_way = self._under_way, {}
        if left:
            self._claim()
        for each in left.values():
            kill_named(each.seat, self._namespace)
        for unit in left:
            if self._mailbox is not None:  # the seat is not paid for any more
                self._mailbox.call("end_attempt", unit)

    def end_idle_of_other_pools(self, pool: AnyPool) -> None:
        """End the idle seats of all other pools, whose machines may be those of this pool too."""
        self.end_idle(lambda seat: seat.pool.name != pool.name)

    @property
    def _is_taken_over(self) -> bool:
        """Whether another driver uses the seats."""
        return self._mailbox is not None and self._mailbox.taken_over.is_set()

    def _end_all(self) -> None:
        with self._lock:
            left = [*self._idle, *self._parked, *self._busy]
        for seat in left:
            self._end(seat)

    def _end(self, seat: Seat) -> None:
        """End a seat, unless another driver uses it, or it saves a checkpoint and ends by itself."""
        ends_itself = self._mailbox is not None and self._mailbox.lost.is_set() and seat.node_id
        if not self._is_taken_over and not ends_itself:
            seat.end()

    def _check(self) -> None:
        if self._mailbox is not None:
            self._mailbox.check()

    def _take_idle(self, pool: Pool, avoided: Collection[str]) -> Seat | None:
        wanted = pool.key, pool.slots
        self.end_idle(_on({*ray_internals.draining_nodes(), *self.aside.of(pool)}))
        while True:
            with self._lock:
                usable = (each for each in reversed(self._idle) if (each.pool.key, each.pool.slots) == wanted)
                seat = next((each for each in usable if each.node_id not in avoided), None)
                if seat is None:
                    return None
                self._idle.remove(seat)
            seat.idle_since = float("inf")
            with contextlib.suppress(RayError, PlaceAsideError):  # it ended with its node while it was idle
                if seat.wait(_ANSWER_SECONDS):
                    return seat
            self._end_or_park(seat)

    def _start(self, pool: Pool, avoided: Collection[str]) -> Seat:
        # A pool's limit on workers includes idle seats of its other node types.
        self.end_idle(lambda seat: seat.pool.path == pool.path)
        name = f"{self._run}-{pool.key}-{next(self._numbers)}"
        self._claim()
        actor_class = ray.remote(SeatActor).options(
            name=name,
            namespace=self._namespace,
            lifetime=None if self._mailbox is None else "detached",
            num_cpus=0,
            num_gpus=pool.gpu * pool.slots,
            resources={pool.resource: pool.slots},
            label_selector=self.aside.selector(pool, avoided),
            enable_task_events=False,  # of all calls but those that run the run's work
        )
        actor = actor_class.remote(name, self._mailbox and self._mailbox.handle)
        return Seat(actor, name, pool, self.aside, check=self._check)

    def _claim(self) -> None:
        """Raise an error if another driver has seats of the run, because this one was taken for dead."""
        if self._mailbox is not None:
            self._mailbox.call("answer")

    def _end_or_park(self, seat: Seat) -> None:
        with self._lock:
            self._busy = [each for each in self._busy if each is not seat]
            if seat.parked:
                self._parked.append(seat)
        if not seat.parked:
            self._end(seat)

    def _poll_regularly(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with contextlib.suppress(RayError):
                self.end_idle(_on(ray_internals.draining_nodes()))
                self.end_idle(lambda seat: seat.idle_since < self._clock() - IDLE_SECONDS)
                self.end_parked(self._may_end)

    def _may_end(self, parked: Seat) -> bool:
        """Whether a card may be used again, or its node is going."""
        return parked.node_id in ray_internals.draining_nodes() or not self.aside.has(parked.pool, parked.place)


def _on(nodes: Collection[str]) -> Callable[[Seat], bool]:
    return lambda seat: seat.node_id in nodes
