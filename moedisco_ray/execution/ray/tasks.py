"""Run one pure function on a seat of a pool, or as a Ray task on a CPU of any node."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from moedisco_ray.backend import Placement, held_workers
from moedisco_ray.core.config import Pool
from moedisco_ray.core.errors import CardError, MoeDiscoError, RunError
from moedisco_ray.core.records.events import Emit
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.seats import PlaceAsideError, Seats
from moedisco_ray.execution.ray.task_worker import work
from moedisco_ray.execution.ray.wait_notice import GRACE_SECONDS, WaitNotice

P = ParamSpec("P")
T = TypeVar("T")

_MAX_STARTS = 4
"""Maximum number of attempts at a function whose worker dies."""
_POLL_SECONDS = 1.0
"""Interval between two checks of the stop file, in seconds."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a function runs: on a slot of a pool, or without one, by default on a CPU of any node.

    Attributes:
        pool: Node type whose slot the function needs. None if it needs no slot; it is not metered then.
        emit: Receives the events about the held slot.
        stop: Ends the wait for a slot.
        seats: The run's seats; a function that needs a slot runs on one of them.
        free_bundle: Ray resources of a function that needs no slot.
    """

    pool: Pool | None
    emit: Emit
    stop: StopFile
    seats: Seats
    free_bundle: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"CPU": 1})

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the slot, and wait for its result.

        The slot counts as held from the start of the call until its end. If the worker dies, or torch cannot use its
        GPU, the call waits for another slot.

        Raises:
            MoeDiscoError: The function raised it.
            OSError: The function raised it.
            RunError: The function raised another error, or its worker died four times in a row.
            RunStopped: The run was asked to end before the function began.
        """
        call = functools.partial(function, *args, **kwargs)
        for _ in range(_MAX_STARTS):
            self.stop.check()
            try:
                if self.pool is not None:
                    return self._on_seat(function.__name__, call, self.pool)
                return self._in_task(function.__name__, call)
            except RayTaskError as error:
                if isinstance(error.cause, (MoeDiscoError, OSError)):
                    raise error.cause from None
                raise RunError(f"{function.__name__}: {error.cause!r}") from error
            except RayError as error:
                lost = error
        raise RunError(f"{function.__name__}: its worker died repeatedly; see the Ray logs") from lost

    def _on_seat(self, name: str, call: Callable[[], T], pool: Pool) -> T:
        while True:
            self.seats.aside.check(pool)
            try:
                with self.seats.taken(pool) as seat:
                    self._wait_for_start(functools.partial(seat.wait, _POLL_SECONDS), Placement(pool, 1, 0).bundle)
                    with held_workers(self.emit, pool, 1):
                        return seat.run(name, call)
            except RayTaskError as error:  # first: it may be an instance of its cause's class, too
                if not isinstance(error.cause, CardError):
                    raise
                self.seats.aside.put(error.cause, self.emit)
            except CardError as error:
                self.seats.aside.put(error, self.emit)
            except PlaceAsideError:
                continue  # the seat keeps that card, so that the next one gets another

    def _in_task(self, name: str, call: Callable[[], T]) -> T:
        bundle = self.free_bundle
        resources = {tag: amount for tag, amount in bundle.items() if tag != "CPU"}
        task = (
            ray.remote(work)
            .options(
                name=name,
                num_cpus=bundle.get("CPU", 0),
                resources=resources,
                # Ray's own retry would wait for its resources without a notice.
                max_retries=0,
            )
            .remote([ray.put(call)])
        )
        with contextlib.ExitStack() as unless_begun:
            # With force: a task that begins at this very moment must not write into a directory that is being removed.
            unless_begun.callback(ray.cancel, task, force=True)
            self._wait_for_start(lambda: bool(ray.wait([task], timeout=_POLL_SECONDS)[0]), bundle)
            ray.get(next(task))
            unless_begun.pop_all()
        found: T = ray.get(next(task))
        return found

    def _wait_for_start(self, started: Callable[[], bool], bundle: Mapping[str, float]) -> None:
        aside = frozenset[str]() if self.pool is None else self.seats.aside.of(self.pool)

        def message() -> str:
            return session.wait_message([bundle], 1, session.free_workers(bundle, aside), aside)

        wait_for_start(started, message, self.emit, self.stop)


def wait_for_start(
    started: Callable[[], bool], message: Callable[[], str], emit: Emit, stop: StopFile, grace: float = GRACE_SECONDS
) -> None:
    """Wait for a task to start, and warn once if that takes long.

    Args:
        started: Waits briefly, and returns whether the task has started.
        message: Says what the task waits for.
        emit: Receives the `warning`.
        stop: Ends the wait.
        grace: Seconds of waiting before the warning.

    Raises:
        RunStopped: The run was asked to end.
    """
    notice = WaitNotice(emit)
    while not started():
        stop.check()
        notice.waiting(message, grace)
