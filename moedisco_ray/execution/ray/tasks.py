"""Run one pure function on one worker of a pool."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from moedisco_ray.backend import Placement, held_workers
from moedisco_ray.core.config import Pool
from moedisco_ray.core.errors import MoeDiscoError, RunError
from moedisco_ray.core.events import Emit
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.task_worker import work
from moedisco_ray.execution.ray.wait_notice import GRACE_SECONDS, WaitNotice

P = ParamSpec("P")
T = TypeVar("T")

_MAX_STARTS = 4
"""Maximum number of attempts at a function whose worker dies."""
_POLL_SECONDS = 1.0
"""Interval between two checks of the stop file (s)."""


def run_on(pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a Ray task that holds one slot of the pool (None: a CPU of any node), and wait for it.

    The slot counts as held from the start of the task on its worker until its end. A task whose worker died waits for another slot.

    Raises:
        MoeDiscoError: The function raised it.
        OSError: The function raised it.
        RunError: The function raised another error, or its worker died four times in a row.
        RunStopped: The run was asked to end before the function began.
    """
    call = ray.put((function, args, kwargs))
    for _ in range(_MAX_STARTS):
        stop.check()
        try:
            result: T = _attempt(function.__name__, call, pool, emit, stop)
        except RayTaskError as error:
            if isinstance(error.cause, (MoeDiscoError, OSError)):
                raise error.cause from None
            raise RunError(f"{function.__name__}: {error.cause!r}") from error
        except RayError as error:
            lost = error
        else:
            return result
    raise RunError(f"{function.__name__}: its worker died repeatedly; see the Ray logs") from lost


def _attempt(name: str, call: ray.ObjectRef, pool: Pool | None, emit: Emit, stop: StopFile) -> Any:
    bundle: dict[str, float] = {"CPU": 1} if pool is None else {**Placement(pool, 1, 0).bundle}
    resources = {tag: amount for tag, amount in bundle.items() if tag not in ("CPU", "GPU")}
    task = ray.remote(work).options(
        name=name, num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), resources=resources,
        # Ray's own retry would wait for a slot without a notice, and the wait would be charged.
        max_retries=0).remote([call])
    with contextlib.ExitStack() as unless_begun:
        # Use force: a task that begins at this moment must not write into a directory that is being removed.
        unless_begun.callback(ray.cancel, task, force=True)
        wait_for_start(
            lambda: bool(ray.wait([task], timeout=_POLL_SECONDS)[0]),
            lambda: session.wait_message([bundle], 1, session.free_workers(bundle)), emit, stop)
        ray.get(next(task))
        unless_begun.pop_all()
    with held_workers(emit, pool, 1):
        return ray.get(next(task))


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
