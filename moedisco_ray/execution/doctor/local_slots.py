"""Slots of this machine without Ray: a process for each card, and processes without a card for pools without GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import TypeVar

from moedisco_ray.execution.doctor.slot import SlotPlace
from moedisco_ray.execution.doctor.work import SlotWork, Work

T = TypeVar("T")

_MOST_WITHOUT_CARD = 2
"""Processes of a pool without GPUs: with two, they can exchange data."""


@dataclasses.dataclass(frozen=True)
class LocalSlot:
    """A slot of this machine for one pool; slots of several pools on one card share its process.

    Attributes:
        work: What to try.
        place: The slot's device.
        process: The process that holds it.
        brief: Whether another pool's slot makes the trials that do not depend on the pool.
    """

    work: SlotWork
    place: SlotPlace
    process: ProcessPoolExecutor
    brief: bool

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in the slot's process, after the calls before it."""
        return self.process.submit(function)


@contextlib.contextmanager
def local_slots(work: Work, gpus: int) -> Iterator[list[LocalSlot]]:
    """The slots of this machine, until the block ends.

    Args:
        work: What to try, by pool.
        gpus: Number of cards of this machine.
    """
    with contextlib.ExitStack() as stack:
        processes: dict[tuple[str | None, int], ProcessPoolExecutor] = {}
        slots = []
        for each in work.slots:
            if each.pool.gpu:
                where: list[tuple[str | None, int]] = [(card, 0) for card in _visible(gpus)]
            else:
                where = [(None, number) for number in range(min(_MOST_WITHOUT_CARD, each.workers))]
            for card, number in where:
                brief = (card, number) in processes
                if not brief:
                    processes[card, number] = stack.enter_context(_process(card))
                place = SlotPlace("cpu") if card is None else SlotPlace("cuda:0", card)
                slots.append(LocalSlot(each, place, processes[card, number], brief))
        yield slots


def _visible(gpus: int) -> list[str]:
    """Indices of this machine's cards, as far as the user lets programs see them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(card) for card in range(gpus)] if named is None else [each for each in named.split(",") if each][:gpus]


@contextlib.contextmanager
def _process(card: str | None) -> Iterator[ProcessPoolExecutor]:
    # A new interpreter: a fork of one that has used a GPU cannot use it.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(card,))
    process = executor.submit(os.getpid)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(BrokenExecutor, OSError):  # it may hang in a call of the driver, or have ended
            os.kill(process.result(), signal.SIGKILL)
        executor.shutdown()


def _prepare(card: str | None) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if card is None else card
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
