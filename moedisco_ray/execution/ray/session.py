"""The Ray cluster of a run: an existing one, or a local one whose custom resources are the pools' tags.

A *slot* is room for one worker of a pool on a node: an amount of 1 of the pool's tag, and a GPU if the pool has GPUs.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data

from moedisco_ray.core.config import LowMemoryPool, Pool, RunConfig
from moedisco_ray.core.errors import PoolError, RunError, raise_together
from moedisco_ray.core.records.events import Emit, Event, discard
from moedisco_ray.core.user_code import offered_folders
from moedisco_ray.execution.local_gpus import lacking_gpus, size_setting
from moedisco_ray.execution.ray import ray_data_internals, ray_internals

START_PAUSES = (2.0, 10.0)
"""Pauses before a local Ray is started again (s): Ray gives up when a busy machine takes over 15 s for one of its
processes."""
_CONNECT_SECONDS = 10.0
"""Seconds in which a Ray cluster must accept a connection."""
VIEW_SECONDS = 2.0
"""Maximum age of the autoscaler's view of free slots, in seconds: Ray updates the view every second."""
FREE_SECONDS = 10.0
"""Maximum time to wait for freed slots, in seconds; it is limited because other work may take them first."""
_REASON_WORDS = 30
_FREE_POLL_SECONDS = 0.1
"""Interval between two checks for freed slots, in seconds."""

NO_DASHBOARD: Mapping[str, Any] = {"env_vars": {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}}
"""Runtime environment for a Ray cluster without a dashboard.

Ray Train asks a dashboard whether a training's controller is alive. Without this address Ray Train would ask the Ray
cluster that this machine last started, which may be another one or may have ended. Ray Train would then wait at the end
of each training, or assume that the controller is dead and remove its placement group.
"""


@contextlib.contextmanager
def ray_cluster(config: RunConfig, emit: Emit = discard) -> Iterator[list[str]]:
    """Connect to Ray until the block ends. Output that is printed meanwhile is written to RUN_DIR/ray.log.

    A Ray cluster that RAY_ADDRESS names, or that this process is connected to, is used and left running. Otherwise a
    local one is started, which other machines cannot reach and whose custom resources are the pools' tags. It is
    stopped at the end.

    Args:
        config: The run's configuration.
        emit: Receives an event for each start of a local Ray.

    Yields:
        One line for each resource that the run will have to wait for.

    Raises:
        PoolError: The Ray cluster will never have room for a pool's workers, or does not respond; or it is a local one,
            and this machine has too few GPUs.
        RunError: A local Ray did not start, several times in a row.
    """
    with _output_to(config.directory / "ray.log"):
        _quiet()
        ours = not ray.is_initialized()
        address = os.environ.get("RAY_ADDRESS") or "local"
        if ours and address != "local":
            _join(address)
        elif ours:
            _start_local(config, emit)
        try:
            if ours and address == "local":
                raise_together(lacking_gpus(config, int(_offered(()).get("GPU", 0))))
            yield check_pools(config)
        finally:
            if ours:
                ray.shutdown()


@contextlib.contextmanager
def existing_cluster(address: str, log: Path) -> Iterator[None]:
    """Connect to an existing Ray cluster until the block ends. Output that is printed meanwhile is written to a file.

    Args:
        address: Address of the cluster. A connection that this process has already is used, and kept.
        log: The file; its folder is made.

    Raises:
        PoolError: No Ray cluster answers.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with _output_to(log):
        _quiet()
        ours = not ray.is_initialized()
        if ours:
            _join(address)
        try:
            yield
        finally:
            if ours:
                ray.shutdown()


def slots(pool: Pool, aside: Collection[str] = ()) -> int:
    """Number of slots of a pool on the Ray cluster, whether free or held, without those on the nodes `aside`."""
    return _slots(pool, _offered(aside))


def slots_staying(pool: Pool, aside: Collection[str] = ()) -> int:
    """Number of slots of a pool on nodes that are not draining, without those on the nodes `aside`.

    Ray counts all of them, but starts nothing on draining nodes.
    """
    return slots(pool, {*ray_internals.draining_nodes(), *aside})


def slots_on(pool: Pool, node_id: str) -> int:
    """Number of slots of a pool on one node, whether free or held; 0 if the node is gone."""
    return _slots(pool, next((node["Resources"] for node in ray.nodes() if _is(node, node_id)), {}))


def _is(node: Mapping[str, Any], node_id: str) -> bool:
    return bool(node["Alive"]) and node["NodeID"] == node_id


def _offered(aside: Collection[str]) -> Mapping[str, float]:
    """Resources of all nodes but those `aside`, whether free or held."""
    offered: dict[str, float] = collections.defaultdict(float)
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in aside:
            for name, amount in node["Resources"].items():
                offered[name] += amount
    return offered


def _slots(pool: Pool, resources: Mapping[str, float]) -> int:
    offered = int(resources.get(pool.resource, 0))
    return offered if not pool.gpu else min(offered, int(resources.get("GPU", 0)) // pool.gpu)


def free_workers(bundle: Mapping[str, float], aside: Collection[str] = ()) -> int:
    """Number of workers with these resources that could start now, as far as Ray knows.

    Draining nodes and the nodes `aside` do not count.
    """
    avoided = {*ray_internals.draining_nodes(), *aside}
    return sum(
        _workers_that_fit(bundle, available)
        for node, available in ray_internals.available_resources_per_node().items()
        if node not in avoided
    )


def _workers_that_fit(bundle: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0) // amount) for name, amount in bundle.items())


@contextlib.contextmanager
def freeing(tag: str, slots: int) -> Iterator[None]:
    """After the block, which frees a number of slots with a tag, wait until the autoscaler knows that they are free.

    Otherwise the autoscaler would start further nodes for the work that takes the slots. The wait takes at most 12 s,
    because other work may take the slots first.
    """
    wanted = free_workers({tag: 1}) + slots
    yield
    if not slots:
        return
    deadline = time.monotonic() + FREE_SECONDS
    while free_workers({tag: 1}) < wanted and time.monotonic() < deadline:
        time.sleep(_FREE_POLL_SECONDS)
    time.sleep(VIEW_SECONDS)


def wait_message(bundles: Sequence[Mapping[str, float]], workers: int, free: int, aside: Collection[str] = ()) -> str:
    """A sentence that says which slots workers wait for.

    Args:
        bundles: Resources of one worker, for each suitable node type; the first resource is the node type's tag.
        workers: Number of workers that start at once.
        free: Number of workers that could start now.
        aside: Ids of nodes whose slots do not count.
    """
    by_tag = {next(iter(bundle)): bundle for bundle in bundles}
    resources = _offered(aside)
    total = sum(_workers_that_fit(bundle, resources) for bundle in by_tag.values())
    found = f"{free} of {total} are free" if total else "no node of the Ray cluster offers it now"
    return f"waits for {workers} {' or '.join(by_tag)}{' at once' if workers > 1 else ''}: {found}"


def autoscales() -> bool:
    """Whether an autoscaler may add nodes: nodes that an autoscaler has started are marked."""
    return any(node.get("NodeTypeName") or "ray.io/node-group" in node.get("Labels", {}) for node in ray.nodes())


def room(pool: Pool, aside: Collection[str] = (), cards_aside: int = 0) -> int:
    """Number of one-worker trainings that a pool's nodes can run at once.

    Args:
        pool: The pool.
        aside: Ids of nodes whose slots do not count.
        cards_aside: Number of further slots that do not count.
    """
    found = sum(slots_staying(node_type, aside) for node_type in pool.node_types)
    return max(0, min(found - cards_aside, max_workers(pool)))


def max_workers(pool: Pool) -> int:
    """Maximum number of workers at the same time, as configured; practically unlimited for the high-memory pool."""
    return pool.max_workers if isinstance(pool, LowMemoryPool) else sys.maxsize


def max_slots(pool: Pool) -> float:
    """Maximum number of slots that the autoscaler may bring; infinite if it states no maximum."""
    limits = ray_internals.max_cluster_resources() if autoscales() else None
    return (
        math.inf
        if not limits
        else sum(max(slots(node_type), _slots(node_type, limits)) for node_type in pool.node_types)
    )


def check_pools(config: RunConfig) -> list[str]:
    """Check that the Ray cluster has the slots that a run needs, or may get them.

    Returns:
        One line for each resource that the run will have to wait for.

    Raises:
        PoolError: The autoscaler's limits allow no node with a pool's tag, or not enough of them for the gang.
    """
    messages = []
    for pool, needed in config.needed_pools:
        now, limit = _slots_together(pool), max_slots(pool)
        field = f"{pool.path}.{'types' if pool.mixed else 'resource'}"
        tags = " or ".join(pool.tags)
        if limit < 1:
            raise PoolError(
                field,
                tags,
                "no node type of this Ray cluster offers it, whatever its autoscaler brings; give one this tag in the "
                "cluster file, or name the tag that one has",
            )
        if limit < needed:
            raise PoolError(
                size_setting(pool, config),
                needed,
                f"the gang needs {needed} {tags} at once, and the Ray cluster's autoscaler brings "
                f"{limit:g} at most; lower it, or raise max_workers in the cluster file",
            )
        if now < needed and not autoscales():
            missing = "it and a GPU" if pool.gpu else "it"
            found = f"has {now}" if now else f"has no node with {missing}"
            messages.append(
                f"{size_setting(pool, config) if now else field}: the run needs {needed} "
                f"{tags}{' at once' if needed > 1 else ''}, and this Ray cluster {found}: it will wait for a node "
                f"(`ray start --address=HEAD:6379 --resources='{{\"{pool.tags[0]}\": 1}}'`)"
            )
    return messages


def _slots_together(pool: Pool) -> int:
    """Number of slots that can train one model: those of all nodes, or of one node if weights are streamed."""
    if pool.memory == "streamed":
        return max((slots_on(pool, node["NodeID"]) for node in ray.nodes()), default=0)
    return sum(slots(node_type) for node_type in pool.node_types)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect standard output (Python's) and standard error (the process') to a file."""
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        # Ray's C++ code bypasses sys.stderr and writes to the file descriptor.
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
        with socket.create_connection(host_and_port, _CONNECT_SECONDS):
            pass  # without this test connection, Ray would wait forever for a cluster that does not answer
    except (OSError, ValueError):
        raise PoolError(
            "RAY_ADDRESS",
            address,
            "no Ray cluster answers there; give HOST:PORT as `ray start --head` prints it, or unset it to "
            "run on this machine alone",
        ) from None
    # else Ray Train does not list its trainings in the dashboard
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    ray.init(
        address=found,
        runtime_env={"env_vars": {"RAY_ADDRESS": found, **offered_folders()}},
        job_config=ray_internals.JobWithoutFolders(),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _start_local(config: RunConfig, emit: Emit) -> None:
    for pause in (*START_PAUSES, None):
        emit(Event("ray_starting"))
        try:
            _init_local(config)
            break
        except Exception as error:  # Ray itself raises this type when one of its processes is late
            reason = " ".join(str(error).split()[:_REASON_WORDS])
            if pause is None:
                raise RunError(
                    f"Ray did not start on this machine, {len(START_PAUSES) + 1} times in a row ({reason}); end "
                    f"programs that keep it busy. Ray's output is in {config.directory / 'ray.log'}"
                ) from error
            emit(
                Event("warning", data={"message": f"Ray did not start ({reason}); it is started again in {pause:g} s"})
            )
            time.sleep(pause)


def _init_local(config: RunConfig) -> None:
    low, high = config.pools.low_memory, config.pools.high_memory
    cores = os.cpu_count() or 1
    sizes = [low.fewest_workers] if config.finetune_pool is low else local_slots(low, cores)
    low_slots = [
        (node_type.resource, max(count, low.fewest_for_seed))
        for node_type, count in zip(low.node_types, sizes, strict=True)
    ]
    low_slots += [(owner.resource, 1) for owner in config.pools.owners.values()]
    # The smallest gang must fit, even with more workers than cores.
    high_slots = high.most_workers if high.gpu else min(high.most_workers, max(high.fewest_workers, cores))
    with ray_internals.on_loopback():
        ray.init(
            address="local",
            num_cpus=max(cores, sum(count for _, count in low_slots), high_slots),
            resources=_sum_by_tag(*low_slots, (high.resource, high_slots)),
            include_dashboard=False,
            runtime_env=dict(NO_DASHBOARD),
            job_config=ray_internals.JobWithoutFolders(),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def local_slots(pool: LowMemoryPool, cores: int) -> list[int]:
    """Slots of each node type of a pool on one machine.

    On CPU a slot is a core: more trainers than cores only slow each other down. Each node type has one slot; the first
    types get more, up to their `max_workers`, while cores remain.
    """
    left = pool.max_workers if pool.gpu else min(pool.max_workers, cores)
    slots = []
    for node_type, after in zip(pool.node_types, range(len(pool.node_types) - 1, -1, -1), strict=True):
        slots.append(max(1, min(node_type.max_workers, left - after)))
        left -= slots[-1]
    return slots


def _sum_by_tag(*tags: tuple[str, int]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for tag, count in tags:
        totals[tag] = max(totals.get(tag, 0), count)
    return totals


def _quiet() -> None:
    """Keep Ray's messages off the terminal, and Ray Data's bookkeeping out of the lists that Ray shows.

    Ray's logs stay in its session directory.
    """
    ray_data_internals.hide_bookkeeping()
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
