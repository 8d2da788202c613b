"""Seats: long-lived actors that each hold one slot of a pool and run one piece of work after the other.

A process that has imported torch and holds its GPU takes milliseconds to begin the next sub-model; a new one takes
seconds, and a Ray Train run with one worker starts five more processes on the head node. So a run starts a seat when
work needs a slot, and keeps it for the work that follows. A seat whose work failed is ended, so that nothing of a
broken process remains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from moedisco_ray.core.config import AnyPool, Pool
from moedisco_ray.execution.cards import CHECK_SECONDS, hanging_card
from moedisco_ray.execution.ray import ray_internals
from moedisco_ray.execution.ray.card_check import check_card
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.execution.ray.seat_actor import Seat as SeatActor

T = TypeVar("T")

IDLE_SECONDS = 30.0
"""Seconds for which a run keeps a seat without work: longer than most pauses between stages, but short for another run
that waits."""
POLL_SECONDS = 1.0
"""Interval at which idle seats are checked, and ended if they are no longer needed, in seconds."""
_ANSWER_SECONDS = 5.0
"""Seconds in which an idle seat must answer a check before it gets work."""


@dataclasses.dataclass
class Seat:
    """A process that holds a slot of a pool, and runs work there.

    Attributes:
        actor: The seat's process; killing it frees the slot.
        pool: Node type whose slot the seat holds.
        node_id: Id of the seat's node; empty until the seat has a slot.
        idle_since: Time at which the seat's last work ended; infinite while the seat works.
        checked: Whether the seat's GPU was found to work.
        aside: Notes that it was.
    """

    actor: ActorHandle
    pool: Pool
    aside: NodesAside
    node_id: str = ""
    idle_since: float = float("inf")
    checked: bool = False

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the seat has its slot, or until a timeout; returns whether it has a slot.

        Raises:
            RayError: The seat's process ended, or Ray cannot start it.
        """
        with contextlib.suppress(GetTimeoutError):
            self.node_id = ray.get(self.actor.node.remote(), timeout=seconds)
            return True
        return False

    def run(self, name: str, function: Callable[[], T]) -> T:
        """Call a function in the seat's process, once its GPU has been found to work.

        Ray's list of tasks shows the call as `name`.

        Raises:
            CardError: The check of the GPU does not end.
            RayError: The function raised an error, or the seat's process ended. Its cause is a `CardError` if torch
                cannot use the GPU.
        """
        if self.pool.gpu and not self.checked:
            self._check_card(f"{self.pool.path}.gpu")
        found: T = ray.get(self.actor.run.options(name=name).remote(function))
        return found

    def _check_card(self, field: str) -> None:
        try:
            ray.get(self.actor.check.remote(functools.partial(check_card, field)), timeout=CHECK_SECONDS)
        except GetTimeoutError as error:
            raise hanging_card(field, self.pool.gpu, self.node_id) from error
        self.checked = True
        self.aside.found_working()

    def end(self) -> None:
        """End the seat's process, whatever it does or waits for."""
        ray.kill(self.actor)


class Seats:
    """Starts a run's seats, lends them to work, and ends them. Several threads may use this object at the same time.

    Args:
        run: Prefix of the actors' names.
        clock: Returns the current time in seconds.

    Attributes:
        aside: Nodes on which no seat starts.
    """

    def __init__(self, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self.aside = NodesAside()
        self._lock = threading.Lock()
        self._idle: list[Seat] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._end_unused, name="seats", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closed.set()
        self._thread.join()
        self.end_idle()

    @contextlib.contextmanager
    def taken(self, pool: Pool, avoided: Collection[str] = ()) -> Iterator[Seat]:
        """Lend a seat of a node type to the block: an idle seat, or a new one, which may still wait for its slot.

        The seat becomes idle at the end of the block, or is ended if the block raises an error.

        Args:
            pool: The node type.
            avoided: Ids of nodes on which the seat must not be.
        """
        seat = self._take_idle(pool, avoided) or self._start(pool, avoided)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(seat.end)
            yield seat
            on_failure.pop_all()
        seat.idle_since = self._clock()
        with self._lock:
            self._idle.append(seat)

    def idle(self, tag: str) -> int:
        """Number of slots with a tag whose actor waits for work now."""
        with self._lock:
            return sum(seat.pool.resource == tag for seat in self._idle)

    def end_idle(self, where: Callable[[Seat], bool] = lambda _seat: True) -> None:
        with self._lock:
            matching = [seat for seat in self._idle if where(seat)]
            self._idle = [seat for seat in self._idle if seat not in matching]
        for seat in matching:
            seat.end()

    def end_idle_of_other_pools(self, pool: AnyPool) -> None:
        """End the idle seats of all other pools, whose machines may be those of this pool too."""
        self.end_idle(lambda seat: seat.pool.name != pool.name)

    def _take_idle(self, pool: Pool, avoided: Collection[str]) -> Seat | None:
        self.end_idle(_on({*ray_internals.draining_nodes(), *self.aside.of(pool)}))
        while True:
            with self._lock:
                usable = (seat for seat in reversed(self._idle) if seat.pool.key == pool.key)
                seat = next((seat for seat in usable if seat.node_id not in avoided), None)
                if seat is None:
                    return None
                self._idle.remove(seat)
            seat.idle_since = float("inf")
            with contextlib.suppress(RayError):  # it ended with its node while it was idle
                if seat.wait(_ANSWER_SECONDS):
                    return seat
            seat.end()

    def _start(self, pool: Pool, avoided: Collection[str]) -> Seat:
        # A pool's limit on workers includes idle seats of its other node types.
        self.end_idle(lambda seat: seat.pool.path == pool.path)
        actor = ray.remote(SeatActor).options(
            name=f"{self._run}-{pool.key}-{uuid.uuid4().hex[:8]}",
            num_cpus=0,
            num_gpus=pool.gpu,
            resources={pool.resource: 1},
            label_selector=self.aside.selector(pool, avoided),
        )
        return Seat(actor.remote(), pool, self.aside)

    def _end_unused(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with contextlib.suppress(RayError):
                self.end_idle(_on(ray_internals.draining_nodes()))
                self.end_idle(_idle_before(self._clock() - IDLE_SECONDS))


def _on(nodes: Collection[str]) -> Callable[[Seat], bool]:
    return lambda seat: seat.node_id in nodes


def _idle_before(time: float) -> Callable[[Seat], bool]:
    return lambda seat: seat.idle_since < time
