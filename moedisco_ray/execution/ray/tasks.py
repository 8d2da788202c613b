"""One pure function on one worker of a pool."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from moedisco_ray.backend import Placement, holding
from moedisco_ray.core.config import Pool
from moedisco_ray.core.errors import MoeDiscoError, RunError
from moedisco_ray.core.events import Emit
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.task_worker import work
from moedisco_ray.execution.ray.wait_notice import PATIENCE_SECONDS, WaitNotice

P = ParamSpec("P")
T = TypeVar("T")

_MOST_STARTS = 4
"""Of a function whose worker dies."""
_LOOK_SECONDS = 1.0
"""Between two looks at the stop file."""


def run_on(pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a Ray task that holds one slot of the pool (None: a CPU of any node), and wait for it.

    The slot counts as held from when the task has begun on its worker until it ends; one whose worker died waits for another.

    Raises:
        MoeDiscoError: What the function raised, as it raised it.
        OSError: The same.
        RunError: Any other error of the function, or the worker's death four times in a row.
        RunStopped: Somebody asked the run to end before the function began.
    """
    call = ray.put((function, args, kwargs))
    for _ in range(_MOST_STARTS):
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
        # Ray's own retry would wait for a slot unseen, which would be charged.
        max_retries=0).remote([call])
    with contextlib.ExitStack() as unless_begun:
        # By force: one that begins this very moment must not write into a directory that is being removed.
        unless_begun.callback(ray.cancel, task, force=True)
        until_begun(
            lambda: bool(ray.wait([task], timeout=_LOOK_SECONDS)[0]),
            lambda: session.missing([bundle], 1, session.free(bundle)), emit, stop)
        ray.get(next(task))
        unless_begun.pop_all()
    with holding(emit, pool, 1):
        return ray.get(next(task))


def until_begun(
    begun: Callable[[], bool], missing: Callable[[], str], emit: Emit, stop: StopFile, patience: float = PATIENCE_SECONDS,
) -> None:
    """Wait for a task to begin; say so once if that takes long.

    Args:
        begun: Waits a moment, and tells whether it has.
        missing: For people: what it waits for.
        emit: Takes the `warning`.
        stop: Ends the waiting.
        patience: Seconds until that is said.

    Raises:
        RunStopped: Somebody asked the run to end.
    """
    standstill = WaitNotice(emit)
    while not begun():
        stop.check()
        standstill.waits(missing, patience)
