"""Runs whose machines come, go and lose power at seeded moments give the undisturbed run's result, bit for bit.

CHAOS_SEEDS is the number of seeds.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from changing_pools import ChangingPools, Hit
from pool_plan import NODES, draw
from small_run import begin_at, same_outcome, small_config, units
from spot_nodes import SpotNodes
from step_account import attempts, check_losses, lost

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

SEEDS = int(os.environ.get("CHAOS_SEEDS", "30"))
INTERVAL = 8
SUBMODELS = 3
POOLS = {"submodels": "low_mem_gpu", "finetune": "high_mem_gpu"}
_log = logging.getLogger(__name__)
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return pipeline.run(config(tmp_path_factory.mktemp("undisturbed")), backend=LocalBackend())


def config(output: Path) -> RunConfig:
    """One sub-model more than there are nodes; every step is reported."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 128,
        "num_experts": SUBMODELS,
        "num_experts_per_tok": 2,
    }
    optimizer = {"batch_tokens": 4096, "lr": 2e-3}
    return small_config(
        output,
        tokens={"total": 800_000, "finetune_share": 0.2},
        model={"family": "qwen3_moe", "config": sizes},
        clusters={"count": SUBMODELS},
        submodels={"optimizer": optimizer},
        finetune={"optimizer": optimizer},
        checkpoint={"every": INTERVAL},
        evaluation={"max_tokens": 2000, "prompts": ["def "]},
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_outlives_its_machines(
    nodes: SpotNodes, undisturbed: Path, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, __name__)
    nodes.reset({POOLS[stage]: count for stage, count in NODES.items()})
    mine = config(tmp_path)
    begin_at("submodels", mine, undisturbed)
    planned: dict[str, int] = {}
    totals: dict[str, int] = {}
    for stage in POOLS:
        steps = {unit["name"]: unit["steps"] for unit in units(undisturbed, stage)}
        planned |= steps
        totals[stage] = sum(steps.values())
    plan = draw(seed)
    pools = ChangingPools(plan, nodes, POOLS, totals)
    events: list[Event] = []
    began = time.monotonic()
    stop = StopFile(tmp_path / "stop")
    directory = pools.disturb(lambda: pipeline.run(mine, (events.append, pools), stop=stop), stop)
    _log.info("seed %d, %.1f s: %s", seed, time.monotonic() - began, "; ".join(map(str, plan)))
    same_outcome(directory, undisturbed)
    check_restarts(events, pools.hits)
    announced = all(change.kind in ("notice", "arrival") for change in plan)
    check_work(events, planned, announced=announced)
    nodes.check_nothing_is_left()
    assert not (directory / "checkpoints").exists()


def check_restarts(events: list[Event], hits: list[Hit]) -> None:
    """A process that is killed is a failure of its unit's; a machine that goes is none of anybody's."""
    told: dict[str, Counter[str | None]] = defaultdict(Counter)
    for event in events:
        if event.type == "worker_restarted":
            told[event.data["kind"]][event.unit] += 1
    assert told.keys() <= {"died", "preempted"}
    assert told["died"] == Counter(hit.unit for hit in hits if hit.change.kind == "process")
    # More than those: a machine takes with it what has not reported a step yet.
    assert told["preempted"] >= Counter(hit.unit for hit in hits if hit.change.kind != "process")


def check_work(events: list[Event], planned: dict[str, int], *, announced: bool) -> None:
    """Every step is trained, in order, and only steps lost without notice are trained twice."""
    trained = attempts(events)
    assert trained.keys() == planned.keys()
    for unit, steps in planned.items():
        mine = trained[unit]
        assert mine[0].start == 0
        assert mine[-1].end == steps
        assert all(attempt.in_a_row for attempt in mine)
        assert len(mine) <= 1 + sum(event.type == "worker_restarted" and event.unit == unit for event in events)
        check_losses(mine, INTERVAL, on_disk=True)
        assert not announced or not any(lost(mine))
        assert sum(event.type == "unit_finished" and event.unit == unit for event in events) == 1
