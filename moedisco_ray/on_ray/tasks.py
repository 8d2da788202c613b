"""One pure function on one worker of a pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import ray
from ray.exceptions import RayTaskError

from moedisco_ray.config import Pool
from moedisco_ray.errors import MoeDiscoError, RunError

P = ParamSpec("P")
T = TypeVar("T")


def run_on(pool: Pool | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a Ray task that holds one slot of the pool (None: a CPU of any node), and wait for it.

    Raises:
        MoeDiscoError: What the function raised, as it raised it.
        RunError: Any other error of the function, or the worker's death three times in a row.
    """
    options: dict[str, object] = {"num_cpus": 1, "max_retries": 3}
    if pool is not None:
        options |= {"num_cpus": 0 if pool.gpu else 1, "num_gpus": pool.gpu, "resources": {pool.resource: 1}}
    try:
        return ray.get(ray.remote(function).options(**options).remote(*args, **kwargs))
    except RayTaskError as error:
        if isinstance(error.cause, (MoeDiscoError, OSError)):
            raise error.cause from None
        raise RunError(f"{function.__name__}: {error.cause!r}") from error
    except ray.exceptions.WorkerCrashedError as error:
        raise RunError(f"{function.__name__}: its worker died repeatedly; see the Ray logs") from error
