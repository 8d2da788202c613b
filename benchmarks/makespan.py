"""Time to train eight sub-models of unequal length on few spot machines, against the shortest possible time.

The cluster is real: Ray's processes, a raylet per node with room for one trainer, Ray Train runs, checkpoints, SIGKILL
to raylets. Only the accelerator is not: after a step of a tiny model its trainer waits for as long as a GPU would
compute, so that nodes that share a few cores do not slow each other down. The bound is max(longest, sum / nodes) of
what the steps wait, which no schedule beats.

Losses are a Poisson process: each node lives for an exponentially distributed time, five checkpoint intervals in the
mean, and its replacement is started at once. Sub-models here last minutes, where real ones last hours, and a start of
Ray Train takes as long here as there; so a second bound counts one undisturbed start of each sub-model in addition to
its steps. Starts after losses are never taken off.

The Ray clusters that `--nodes` names run at the same time. A cluster with more nodes has longer sub-models in
proportion, so that all take the same time, and mostly wait. Sharing cores can only make these figures worse, and with
all four at once it does: on 4 nodes a start then takes 33 s, with two at once 21 s. Next to 3 nodes, 2 nodes with
losses took 1.254 times the bound, alone 1.218. Cells of earlier calls with the same setting are kept.

    for nodes in "4 1" 3 2; do python -m benchmarks.makespan --nodes $nodes; done     three hours; nothing else may run
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from benchmarks.harness import RESULTS, environment, run_arm, spread, write_result
from benchmarks.pace import Pace
from benchmarks.study.simulation.phase import makespan_bound
from moedisco_ray.backend import Placement
from moedisco_ray.core.config import Architecture, LowMemoryPool, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.execution.ray.session import NO_DASHBOARD
from moedisco_ray.models import ModelMap, config_values, hf_config, random_weights, submodel_config, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.stages.decompose import decompose
from moedisco_ray.training import TrainJob

SIZES = Architecture(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    moe_intermediate_size=24,
    num_experts=1,
    num_experts_per_tok=1,
)
VOCABULARY, LENGTH, BATCH = 64, 16, 4
PACE = 1.0
"""Seconds of a step."""
SHARES = (1.8, 1.5, 1.2, 1.1, 0.9, 0.8, 0.5, 0.2)
"""Lengths of the sub-models, relative to their mean; the longest first, they fill 4 nodes evenly, and 1 to 3 within 5
%."""
INTERVALS_PER_LOSS = 5
STAGGER = 60.0
"""Seconds between the beginnings of two clusters, for which one trainer after the other starts."""
TARGETS = {"none": 1.10, "poisson": 1.25}
POOL = LowMemoryPool()
MEMORY = 80_000_000


class Machines:
    """The nodes of a pool: their number is constant, and each is lost after its lifetime.

    As a listener of events, it records when each node began to train.
    """

    def __init__(self, cluster: Cluster, count: int, mean_life: float | None, seed: int) -> None:
        self.losses = 0
        self.arrivals: list[float] = []
        self._cluster = cluster
        self._mean_life = mean_life
        self._generator = random.Random(seed)
        self._arrived: dict[str, float] = {}
        self._starting: dict[str, float] = {}
        self._living: list[tuple[float, Node]] = []
        self._stopped = threading.Event()
        for _ in range(count):
            self._add()
        self._arrived.clear()  # those that are there from the beginning wait for the queue, not the queue for them

    def __call__(self, event: Event) -> None:
        if event.unit is None:
            return
        if event.type == "unit_started":
            arrived = self._arrived.pop(event.data["node_id"], None)
            self._starting.pop(event.unit, None)  # a trainer that came no further
            if arrived is not None:
                self._starting[event.unit] = arrived
        elif event.type == "progress" and event.unit in self._starting:
            self.arrivals.append(event.time - self._starting.pop(event.unit))

    def live(self) -> None:
        """Lose nodes when their time has come, until `stop`."""
        while not self._stopped.wait(
            max(0.0, min(end for end, _ in self._living) - time.time()) if self._mean_life else None
        ):
            end, node = min(self._living, key=lambda life: life[0])
            self._living.remove((end, node))
            os.kill(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid, signal.SIGKILL)
            self._cluster.remove_node(node, allow_graceful=False)
            self.losses += 1
            self._add()

    def stop(self, _: Future[Any]) -> None:
        self._stopped.set()

    def _add(self) -> None:
        node = self._cluster.add_node(num_cpus=1, resources={POOL.resource: 1}, object_store_memory=MEMORY)
        self._arrived[node.node_id] = time.time()
        life = self._generator.expovariate(1 / self._mean_life) if self._mean_life else 0.0
        self._living.append((time.time() + life, node))


def jobs(scratch: Path, mean_seconds: float, interval: int) -> list[TrainJob]:
    config = config_values(hf_config("qwen3_moe", SIZES, VOCABULARY, LENGTH, 0))
    tensors = decompose(random_weights(config, 0), ModelMap("qwen3_moe"), 1, 1, 0)
    write_checkpoint(scratch / "start", tensors, submodel_config(config, 1))
    write_packed(
        scratch / "shards", [[np.random.default_rng(0).integers(1, VOCABULARY, 20_000)]], eos=0, vocab_size=VOCABULARY
    )
    return [
        TrainJob(
            stage="submodels",
            name=f"submodel-{k}",
            model=scratch / "start",
            packed_dirs=(scratch / "shards",),
            output=scratch / str(k) / "trained",
            checkpoints=scratch / str(k) / "steps",
            steps=round(share * mean_seconds / PACE),
            sequence_length=LENGTH,
            optimizer=Optimizer(batch_tokens=BATCH * LENGTH),
            checkpoint_every=interval,
            log_every=1,
            held_out=Pace(PACE),
        )
        for k, share in enumerate(SHARES)
    ]


def starts(events: list[Event], seconds_of_work: dict[str, float]) -> list[float]:
    """Seconds for which each undisturbed sub-model held a slot, without those of its work."""
    disturbed = {event.unit for event in events if event.type == "worker_restarted"}
    return [
        event.data["seconds"] - seconds_of_work[event.unit]
        for event in events
        if event.type == "unit_finished" and event.unit is not None and event.unit not in disturbed
    ]


def measure(losses: str, nodes: int, mean_seconds: float, interval: int, seed: int) -> dict[str, Any]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": MEMORY,
            # On one machine a refused connection is no network hiccup: a node is given up after 1.5 s, not after 15.
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
        },
    )
    ray.init(address=cluster.address, runtime_env=dict(NO_DASHBOARD), log_to_driver=False, logging_level=logging.ERROR)
    machines = Machines(cluster, nodes, INTERVALS_PER_LOSS * interval * PACE if losses == "poisson" else None, seed)
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        machines(event)

    try:
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as thread:
            submodels = jobs(Path(scratch), mean_seconds, interval)
            began = time.monotonic()
            training = thread.submit(
                train_all, submodels, Placement(POOL, 1, max_failures=3), Path(scratch) / "ray", listen
            )
            training.add_done_callback(machines.stop)
            machines.live()  # in the main thread, from which Ray wants nodes to be started
            training.result()
            makespan = time.monotonic() - began
    finally:
        ray.shutdown()
        cluster.shutdown()
    work = {job.name: job.steps * PACE for job in submodels}
    return {
        "makespan": makespan,
        "losses": machines.losses,
        "work": list(work.values()),
        "starts": starts(events, work),
        "arrivals": machines.arrivals,
        "restarts": [event.data["kind"] for event in events if event.type == "worker_restarted"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=list(TARGETS))
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 1])
    parser.add_argument(
        "--mean-seconds", type=float, default=180.0, help="of work per sub-model, times the number of nodes"
    )
    parser.add_argument("--interval", type=int, default=90, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.arm:
        print(
            json.dumps(
                measure(
                    arguments.arm,
                    arguments.nodes[0],
                    arguments.mean_seconds * arguments.nodes[0],
                    arguments.interval,
                    arguments.seed,
                )
            )
        )
        return
    passed_on = [
        f"--mean-seconds={arguments.mean_seconds}",
        f"--interval={arguments.interval}",
        f"--seed={arguments.seed}",
    ]

    def run(losses: str, nodes: int) -> dict[str, Any]:
        time.sleep(STAGGER * arguments.nodes.index(nodes))
        return run_arm(__spec__.name, losses, "--nodes", str(nodes), *passed_on)

    setting = {
        "pace": PACE,
        "shares": list(SHARES),
        "mean_seconds": arguments.mean_seconds,
        "interval_steps": arguments.interval,
        "intervals_per_loss": INTERVALS_PER_LOSS,
        "seed": arguments.seed,
    }
    before = measured_before(setting)
    cells: dict[str, dict[str, Any]] = before["cells"] | {str(nodes): {} for nodes in arguments.nodes}
    start: dict[int, float] = {}
    with ThreadPoolExecutor(len(arguments.nodes)) as threads:
        for losses in TARGETS:
            for nodes, measured in zip(
                arguments.nodes, threads.map(functools.partial(run, losses), arguments.nodes), strict=True
            ):
                start.setdefault(nodes, statistics.median(measured["starts"]))
                cells[str(nodes)][losses] = summary(measured, nodes, start[nodes])
                print(f"{nodes} nodes: {cells[str(nodes)]}")
    made = environment(" ".join(["python -m benchmarks.makespan", *sys.argv[1:]]))
    write_result(
        "makespan",
        {
            "setting": setting,
            "targets": TARGETS,
            "made": before["made"] | {str(nodes): made for nodes in arguments.nodes},
            "cells": cells,
        },
    )


def measured_before(setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`cells` of the result file, and where and with what each was `made`, if they were measured with this setting."""
    path = RESULTS / "makespan.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("setting") == setting else {"cells": {}, "made": {}}


def summary(cell: dict[str, Any], nodes: int, start: float) -> dict[str, Any]:
    work = cell["work"]
    if cell["makespan"] < makespan_bound(work, nodes):
        raise SystemExit(
            f"{nodes} nodes took {cell['makespan']:.0f} s, less than no schedule beats: their steps do not wait"
        )
    return {
        "makespan": cell["makespan"],
        "losses": cell["losses"],
        "restarts": len(cell["restarts"]),
        "start": start,
        "over_bound": cell["makespan"] / makespan_bound(work, nodes),
        "over_bound_with_starts": cell["makespan"] / makespan_bound([seconds + start for seconds in work], nodes),
        **({"arrival": spread(cell["arrivals"])} if cell["arrivals"] else {}),
    }


if __name__ == "__main__":
    main()
