"""Examine the slots of a Ray cluster, each through a seat of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.records.measurements import Check, Measurements
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.execution.doctor.examination import MOST_SECONDS, examine_slots, merged
from moedisco_ray.execution.doctor.slot import SlotPlace
from moedisco_ray.execution.doctor.work import SlotWork, Work
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.card_check import own_cards
from moedisco_ray.execution.ray.interfaces import name_interface
from moedisco_ray.execution.ray.seats import Seat, Seats

T = TypeVar("T")
Show = Callable[[str, Sequence[Check]], None]

_ROUNDS = 2
"""Times that slots are asked for: in the first round, the slots of a pool may have cards that another pool has, too."""
SLOT_SECONDS = 30.0
"""Time in which a free slot starts its process (s); others are held by other work."""
PLACE_SECONDS = 60.0
"""Time in which a process must say where it is (s): it imports torch before."""


@dataclasses.dataclass(frozen=True)
class RaySlot:
    """A slot of a Ray cluster.

    Attributes:
        work: What to try.
        place: The slot's node and device.
        seat: The process that holds it.
        threads: Wait for the answers of seats.
        seconds: Longest time of a call (s).
        brief: False: every slot makes all trials.
    """

    work: SlotWork
    place: SlotPlace
    seat: Seat
    threads: ThreadPoolExecutor
    seconds: float = MOST_SECONDS
    brief: bool = False

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in the slot's process, after the calls before it."""
        return self.threads.submit(_call, self.seat, function, self.seconds)


def examine_cluster(work: Work, address: str, log: Path, show: Show) -> Measurements:
    """Examine every slot that an existing Ray cluster has now and that no other work holds.

    Args:
        work: What to try, by pool.
        address: Address of the cluster.
        log: File for the output of Ray.
        show: Called with the name of what was tried and its checks, as soon as they are known.

    Raises:
        PoolError: The cluster does not answer.
    """
    with session.existing_cluster(address, log), Seats("doctor") as seats:
        return examine_free_slots(work, address, seats, show)


def examine_free_slots(work: Work, address: str, seats: Seats, show: Show) -> Measurements:
    """Examine the slots that no other work holds, of a cluster to which this process is connected."""
    offered = {each.pool.key: session.slots_staying(each.pool) for each in work.slots}
    left, found = dict(offered), list[Measurements]()
    for _ in range(_ROUNDS):
        with free_slots(work, left, seats) as slots:
            for slot in slots:
                left[slot.work.pool.key] -= 1
            if slots:
                found.append(examine_slots(slots, work, address, show))
        seats.end_idle()
        if not slots or not any(left.values()):
            break
    checks = [check for each in work.slots for check in _not_examined(each, offered, left)]
    if checks:
        show("the cluster", checks)
    return merged(found, checks, address)


def _not_examined(work: SlotWork, offered: Mapping[str, int], left: Mapping[str, int]) -> Iterator[Check]:
    """What to say of a pool that has no slots, or whose slots were not free."""
    key = work.pool.key
    if not offered[key]:
        text = f"no node of the cluster offers {work.pool.resource} now"
    elif left[key]:
        text = f"{left[key]} slots are held by other work, or their processes do not start"
    else:
        return
    yield Check(part="system", name=key, state="skipped", found=text)


@contextlib.contextmanager
def free_slots(work: Work, wanted: Mapping[str, int], seats: Seats) -> Iterator[list[RaySlot]]:
    """Start a seat for each wanted slot; the block gets those that have their slot in time, and then they are idle."""
    with contextlib.ExitStack() as stack:
        started = [
            (each, stack.enter_context(seats.taken(each.pool)))
            for each in work.slots
            for _ in range(wanted[each.pool.key])
        ]
        deadline = time.monotonic() + SLOT_SECONDS
        ready = [(each, seat) for each, seat in started if _has_slot(seat, deadline)]
        threads = stack.enter_context(ThreadPoolExecutor(max(1, len(ready)), thread_name_prefix="doctor"))
        places = [
            threads.submit(_call, seat, functools.partial(_place, each.pool.resource), PLACE_SECONDS)
            for each, seat in ready
        ]
        yield [
            RaySlot(each, _known_place(place, each, seat), seat, threads)
            for (each, seat), place in zip(ready, places, strict=True)
        ]
        for each in started:
            if each not in ready:
                each[1].end()


def _has_slot(seat: Seat, deadline: float) -> bool:
    with contextlib.suppress(RayError):
        return seat.wait(max(0.1, deadline - time.monotonic()))
    return False


def _known_place(place: Future[SlotPlace], work: SlotWork, seat: Seat) -> SlotPlace:
    """Where a slot is, as far as it is known if its process does not answer."""
    try:
        return place.result()
    except (MoeDiscoError, RuntimeError):
        device = "cuda:0" if work.pool.gpu else "cpu"
        return SlotPlace(device, "?", f"Ray node {seat.node_id}", work.pool.resource)


def _call(seat: Seat, function: Callable[[], T], seconds: float) -> T:
    """Call a function on a seat, with errors that need no Ray to be understood.

    Raises:
        MoeDiscoError: The function raised it.
        RuntimeError: The function raised another error, the process ended, or it does not answer.
    """
    try:
        # Not `seat.run`, which checks the card first: here that is a check among others.
        found: T = ray.get(seat.actor.run.options(name="doctor").remote(function), timeout=seconds)
    except RayTaskError as error:
        if isinstance(error.cause, MoeDiscoError):
            raise error.cause from None
        raise RuntimeError(first_line(error.cause)) from error
    except RayError as error:
        raise RuntimeError(first_line(error) or "it does not answer") from error
    return found


def _place(resource: str) -> SlotPlace:
    """Where this process runs; from now on its exchanges use the interface of its address."""
    name_interface()
    card, device = own_cards()[0] if ray.get_gpu_ids() else ("0", "cpu")
    return SlotPlace(device, card, ray.util.get_node_ip_address(), resource)
