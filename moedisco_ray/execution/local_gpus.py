"""Compare the GPUs that a run needs at once with those of one machine."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moedisco_ray.core.config import LowMemoryPool, RunConfig
from moedisco_ray.core.config.pools import AnyPool
from moedisco_ray.core.errors import PoolError


def lacking_gpus(config: RunConfig, gpus: int) -> Iterator[PoolError]:
    """The pools whose workers can never start on a machine alone, because it has too few GPUs.

    Args:
        config: The run's configuration.
        gpus: Number of GPUs of the machine.
    """
    for pool, needed in config.needed_pools:
        wanted = math.ceil(needed * pool.gpu)
        if gpus < wanted:
            fewer = f"lower {size_setting(pool, config)}, " if needed > 1 else ""
            yield PoolError(
                f"{pool.path}.gpu",
                pool.gpu,
                f"this machine has {gpus or 'no'} GPU, and the run needs {wanted} at once; {fewer}run it on a Ray "
                f"cluster (RAY_ADDRESS, or `moedisco submit`), or set {pool.path}.gpu=0",
            )


def size_setting(pool: AnyPool, config: RunConfig) -> str:
    """The setting for the number of a pool's workers that must start at once."""
    if not isinstance(pool, LowMemoryPool):
        size = "workers"
    elif pool is config.finetune_pool:
        size = "max_workers"
    else:
        size = "seed_workers"
    return f"pools.{pool.name}.{size}"
