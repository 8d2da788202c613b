"""A Ray cluster for the length of a run: the one that is there, or a local one with the pools' tags as slots."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data

from moedisco_ray.core.config import LowMemoryPool, Pool, RunConfig
from moedisco_ray.core.errors import PoolError
from moedisco_ray.execution.ray import ray_internals

_ANSWER_SECONDS = 10.0
"""For which a cluster that is named may take to answer."""

NO_DASHBOARD: Mapping[str, Any] = {"env_vars": {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}}
"""The runtime environment on a cluster that has none. Helpers of Ray Train ask a dashboard whether the controller of a training
lives. They look for it in the cluster that this machine knows of, which may be another one, or gone: they would wait for it at the
end of each training, or take the controller for dead and remove its placement group."""


@contextlib.contextmanager
def cluster(config: RunConfig) -> Iterator[list[str]]:
    """Be connected to Ray inside the block. What is printed meanwhile goes to RUN_DIR/ray.log.

    A cluster named by RAY_ADDRESS, or one this process is connected to already, is used and left running. Otherwise a local
    one is started whose custom resources are the pools' tags, and is stopped at the end.

    Yields:
        What the run will have to wait for, for people: a line each.

    Raises:
        PoolError: The cluster will never have room for a pool's workers, or does not answer.
    """
    with _output_to(config.directory / "ray.log"):
        _quiet()
        ours = not ray.is_initialized()
        address = os.environ.get("RAY_ADDRESS") or "local"
        if ours and address != "local":
            _join(address)
        elif ours:
            _start_local(config)
        try:
            yield check_pools(config)
        finally:
            if ours:
                ray.shutdown()


def slots(pool: Pool) -> int:
    """Workers that the cluster has room for in this pool, busy or not."""
    return _slots(pool, ray.cluster_resources())


def lasting(pool: Pool) -> int:
    """The same without nodes that are about to be taken away: Ray counts them to the last, and starts nothing there."""
    leaving = ray_internals.draining_nodes()
    staying = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return _slots(pool, {name: sum(each.get(name, 0) for each in staying) for name in (pool.resource, "GPU")})


def _slots(pool: Pool, resources: Mapping[str, float]) -> int:
    offered = int(resources.get(pool.resource, 0))
    return offered if not pool.gpu else min(offered, int(resources.get("GPU", 0)) // pool.gpu)


def free(bundle: Mapping[str, float]) -> int:
    """Workers with a bundle of resources each that could start now, as Ray knew a moment ago; none where a node is about to go."""
    leaving = ray_internals.draining_nodes()
    return sum(
        min(int(there.get(name, 0) // amount) for name, amount in bundle.items())
        for node, there in ray_internals.available_resources_per_node().items() if node not in leaving)


def missing(bundles: Sequence[Mapping[str, float]], workers: int, free: int) -> str:
    """For people: what so many workers wait for.

    Args:
        bundles: Resources of each, the tag of its pool first; of several, any will do.
        workers: How many start at once.
        free: How many of them could.
    """
    by_tag = {next(iter(bundle)): bundle for bundle in bundles}
    resources = ray.cluster_resources()
    there = sum(min(int(resources.get(name, 0) // amount) for name, amount in bundle.items()) for bundle in by_tag.values())
    found = f"{free} of {there} are free" if there else "no node of the cluster offers it now"
    return f"waits for {workers} {' or '.join(by_tag)}{' at once' if workers > 1 else ''}: {found}"


def grows() -> bool:
    """Whether an autoscaler may add nodes: the nodes that one starts name their type."""
    return any(node.get("NodeTypeName") or "ray.io/node-group" in node.get("Labels", {}) for node in ray.nodes())


def room(pool: Pool, workers: int) -> int:
    """Trainers of so many workers that may be under way at once: what there is room for now, over all node types of a pool."""
    return min(sum(lasting(kind) // workers for kind in pool.kinds), cap(pool) // workers)


def cap(pool: Pool) -> int:
    """Workers that may be under way at once, as the configuration has it."""
    return pool.max_workers if isinstance(pool, LowMemoryPool) else sys.maxsize


def most_ever(pool: Pool) -> float:
    """Slots of a pool that the cluster may ever have, by what its autoscaler says; infinite where that says nothing of it."""
    limits = ray_internals.max_cluster_resources() if grows() else None
    return math.inf if not limits else sum(max(slots(kind), _slots(kind, limits)) for kind in pool.kinds)


def check_pools(config: RunConfig) -> list[str]:
    """Refuse to start what would wait for ever.

    Returns:
        What the run will have to wait for, as things are now, for people.

    Raises:
        PoolError: The cluster's autoscaler may never bring a node with a pool's tag, or as many as its gang needs at once.
    """
    waits = []
    for pool, needed in config.pools.needed(config.finetune.pool):
        now, ever = sum(slots(kind) for kind in pool.kinds), most_ever(pool)
        field = f"pools.{pool.kind}.{'types' if pool.mixed else 'resource'}"
        tags = " or ".join(pool.tags)
        if ever < 1:
            raise PoolError(
                field, tags, "no node type of this cluster offers it, whatever its autoscaler brings; give one this tag in the "
                "cluster file, or name the tag that one has")
        if ever < needed:
            raise PoolError(
                _size_of(pool), needed, f"the gang needs {needed} {tags} at once, and the cluster's autoscaler brings {ever:g} at "
                "most; lower it, or raise max_workers in the cluster file")
        if now < needed and not grows():
            found = f"has {now}" if now else f"has no node with it{' and a GPU' if pool.gpu else ''}"
            waits.append(
                f"{_size_of(pool) if now else field}: the run needs {needed} {tags}{' at once' if needed > 1 else ''}, and this "
                f"Ray cluster {found}: it will wait for a node "
                f"(`ray start --address=HEAD:6379 --resources='{{\"{pool.tags[0]}\": 1}}'`)")
    return waits


def _size_of(pool: Pool) -> str:
    return f"pools.{pool.kind}.{'max_workers' if isinstance(pool, LowMemoryPool) else 'workers'}"


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what is printed to a file: standard output as Python sees it, standard error as the process does."""
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        # Ray's C++ part writes to the file descriptor, past sys.stderr.
        terminal = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _join(address: str) -> None:
    try:
        found, host_and_port = ray_internals.cluster_address(address)
        with socket.create_connection(host_and_port, _ANSWER_SECONDS):
            pass    # Ray itself would wait for ever
    except (OSError, ValueError):
        raise PoolError(
            "RAY_ADDRESS", address, "no Ray cluster answers there; give HOST:PORT as `ray start --head` prints it, or unset it to "
            "run on this machine alone") from None
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")   # what the dashboard shows of trainers
    ray.init(
        address=found, runtime_env={"env_vars": {"RAY_ADDRESS": found}}, log_to_driver=False, logging_level=logging.ERROR)


def _start_local(config: RunConfig) -> None:
    low, high = config.pools.low_memory, config.pools.high_memory
    cores = os.cpu_count() or 1
    sizes = [low.fewest_workers] if config.finetune_pool is low else local_slots(low, cores)
    low_slots = [(kind.resource, count) for kind, count in zip(low.kinds, sizes, strict=True)]
    # The smallest gang must fit, whatever it costs.
    high_slots = high.most_workers if high.gpu else min(high.most_workers, max(high.fewest_workers, cores))
    ray.init(
        address="local",
        num_cpus=max(cores, sum(count for _, count in low_slots), high_slots),
        resources=_sum_by_tag(*low_slots, (high.resource, high_slots)),
        include_dashboard=False,
        runtime_env=dict(NO_DASHBOARD),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def local_slots(pool: LowMemoryPool, cores: int) -> list[int]:
    """Slots that one machine offers of each node type of a pool.

    On CPU a slot is a core: more trainers than cores only slow each other down. Of several types each has one slot at least, the
    first ones as many as cores are left.
    """
    left = pool.max_workers if pool.gpu else min(pool.max_workers, cores)
    slots = []
    for kind, after in zip(pool.kinds, range(len(pool.kinds) - 1, -1, -1), strict=True):
        slots.append(max(1, min(kind.max_workers, left - after)))
        left -= slots[-1]
    return slots


def _sum_by_tag(*tags: tuple[str, int]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for tag, count in tags:
        totals[tag] = max(totals.get(tag, 0), count)
    return totals


def _quiet() -> None:
    """Leave the terminal to our own view; Ray's logs stay in its session directory."""
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
