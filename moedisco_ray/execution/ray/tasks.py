"""Run one pure function on one worker of a pool."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from moedisco_ray.backend import Placement, held_workers
from moedisco_ray.core.config import Pool
from moedisco_ray.core.errors import MoeDiscoError, RunError
from moedisco_ray.core.events import Emit
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.execution.ray.task_worker import work
from moedisco_ray.execution.ray.wait_notice import GRACE_SECONDS, WaitNotice

P = ParamSpec("P")
T = TypeVar("T")

_MAX_STARTS = 4
"""Maximum number of attempts at a function whose worker dies."""
_POLL_SECONDS = 1.0
"""Interval between two checks of the stop file (s)."""


def run_on(
    pool: Pool | None, emit: Emit, stop: StopFile, seats: Seats | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs,
) -> T:
    """Call `function` on one slot of the pool (None: on a CPU of any node), and wait for it.

    The slot counts as held from the start of the work on it until its end. Work whose worker died waits for another slot.

    Args:
        pool: One node type of a pool.
        emit: Receives the events about the held slot.
        stop: Ends the wait for a slot.
        seats: Run it on a seat; None: in a Ray task.
        function: The function.
        args: Its arguments.
        kwargs: Its named arguments.

    Raises:
        MoeDiscoError: The function raised it.
        OSError: The function raised it.
        RunError: The function raised another error, or its worker died four times in a row.
        RunStopped: The run was asked to end before the function began.
    """
    call = functools.partial(function, *args, **kwargs)
    for _ in range(_MAX_STARTS):
        stop.check()
        try:
            if pool is not None and seats is not None:
                return _on_seat(function.__name__, call, pool=pool, emit=emit, stop=stop, seats=seats)
            return _in_task(function.__name__, call, pool=pool, emit=emit, stop=stop)
        except RayTaskError as error:
            if isinstance(error.cause, (MoeDiscoError, OSError)):
                raise error.cause from None
            raise RunError(f"{function.__name__}: {error.cause!r}") from error
        except RayError as error:
            lost = error
    raise RunError(f"{function.__name__}: its worker died repeatedly; see the Ray logs") from lost


def _on_seat(name: str, call: Callable[[], T], *, pool: Pool, emit: Emit, stop: StopFile, seats: Seats) -> T:
    bundle = Placement(pool, 1, 0).bundle
    with seats.taken(pool) as seat:
        wait_for_start(
            lambda: seat.wait(_POLL_SECONDS), lambda: session.wait_message([bundle], 1, session.free_workers(bundle)), emit, stop)
        with held_workers(emit, pool, 1):
            return seat.run(name, call)


def _in_task(name: str, call: Callable[[], T], *, pool: Pool | None, emit: Emit, stop: StopFile) -> T:
    bundle: dict[str, float] = {"CPU": 1} if pool is None else {**Placement(pool, 1, 0).bundle}
    resources = {tag: amount for tag, amount in bundle.items() if tag not in ("CPU", "GPU")}
    task = ray.remote(work).options(
        name=name, num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), resources=resources,
        # Ray's own retry would wait for a slot without a notice, and the wait would be charged.
        max_retries=0).remote([ray.put(call)])
    with contextlib.ExitStack() as unless_begun:
        # Use force: a task that begins at this moment must not write into a directory that is being removed.
        unless_begun.callback(ray.cancel, task, force=True)
        wait_for_start(
            lambda: bool(ray.wait([task], timeout=_POLL_SECONDS)[0]),
            lambda: session.wait_message([bundle], 1, session.free_workers(bundle)), emit, stop)
        ray.get(next(task))
        unless_begun.pop_all()
    with held_workers(emit, pool, 1):
        found: T = ray.get(next(task))
        return found


def wait_for_start(
    started: Callable[[], bool], message: Callable[[], str], emit: Emit, stop: StopFile, grace: float = GRACE_SECONDS,
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
