"""The workers that train the seed together: the number for `auto`, what the plan says, and excluded settings."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.cards import PEAK_FLOPS, UTILISATION
from moedisco_ray.core.config import RunConfig, check_config, put
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan import build_plan, fitted, with_cluster_count
from moedisco_ray.plan.reading import StageEstimate
from moedisco_ray.plan.seed_workers import LARGEST_EXCHANGE, seed_workers
from moedisco_ray.plan.stage_plan import StagePlan

VOCABULARY = 16_384
NETWORK_BYTES_PER_SECOND = 1.25e9
ADAMW = {"submodels.optimizer.name": "adamw", "finetune.optimizer.name": "adamw"}


def config_of(
    workers: Any = "auto", batch: int = 2**20, *, changes: dict[str, Any] | None = None, **low: Any
) -> RunConfig:
    raw = yaml.safe_load(preset_text("default")) | {"recipe": None}
    raw["submodels"]["optimizer"]["batch_tokens"] = batch
    raw["pools"]["low_memory"] |= {"card": None, "memory_gb": 24, "speed": 0.72, "seed_workers": workers, **low}
    for path, value in (changes or {}).items():
        section, _, name = path.rpartition(".")
        place = raw
        for part in section.split("."):
            place = place[part]
        place[name] = value
    return with_cluster_count(check_config(raw))


def seed_plan(config: RunConfig) -> StagePlan:
    return next(stage for stage in build_plan(config).stages if stage.stage == "seed")


def exchange(batch: int, workers: int) -> float:
    """Time of an exchange by hand, relative to the computation of a step: 2 (r - 1) / r of 4 bytes per parameter."""
    sent = 2 * (workers - 1) / workers * 4 * alone(batch).parameters.total
    cost = alone(batch).cost
    step = cost.flops / cost.tokens * batch
    return sent / NETWORK_BYTES_PER_SECOND / (step / workers / (PEAK_FLOPS * UTILISATION * 0.72))


@functools.cache
def alone(batch: int) -> StagePlan:
    return seed_plan(config_of(1, batch=batch))


@given(batch=st.sampled_from([2**16, 2**18, 2**19, 2**20, 2**21, 2**22]), slots=st.integers(1, 64))
def test_auto_takes_as_many_workers_as_exchange_in_a_quarter_of_the_time(batch: int, slots: int) -> None:
    config = config_of(batch=batch, max_workers=slots)
    fewest, most = seed_workers(config, VOCABULARY)
    assert fewest == 1
    allowed = [n for n in range(2, slots + 1) if batch // 1024 % n == 0 and exchange(batch, n) <= LARGEST_EXCHANGE]
    assert most == max(allowed, default=1)


def test_small_batches_and_processors_without_gpus_leave_one_worker() -> None:
    assert seed_workers(config_of(batch=65_536), VOCABULARY) == (1, 1)
    assert seed_workers(config_of(gpu=0), VOCABULARY) == (1, 1)


@pytest.mark.parametrize(("wanted", "bounds"), [(4, (4, 4)), ((2, 8), (2, 8)), (1, (1, 1))])
def test_a_number_and_bounds_are_taken_as_they_are(wanted: Any, bounds: tuple[int, int]) -> None:
    assert seed_workers(config_of(wanted), VOCABULARY) == bounds


def seed_estimate(workers: int) -> StageEstimate:
    estimates = build_plan(config_of(workers, changes=ADAMW)).estimates
    return next(each for each in estimates if each.stage == "seed")


def test_the_plan_divides_the_hours_and_adds_the_exchange() -> None:
    alone, together = (seed_plan(config_of(count, changes=ADAMW)) for count in (1, 4))  # Muon's part is not divided
    assert (together.workers, together.units, together.replicas) == (4, 1, 4)
    assert together.traffic is not None
    assert together.traffic.bytes == pytest.approx(1.5 * 4 * alone.parameters.total, rel=0.01)
    waiting = together.steps * together.traffic.bytes / NETWORK_BYTES_PER_SECOND / 3600
    assert together.cost.hours == pytest.approx(alone.cost.hours / 4 + waiting, rel=1e-3)
    assert together.cost.dollars == pytest.approx(alone.cost.dollars + 4 * waiting * 0.35, rel=1e-3)
    assert together.memory.weights == alone.memory.weights  # a whole replica
    one, four = seed_estimate(1), seed_estimate(4)
    # a start-up of each worker and of Ray Train
    assert four.seconds - 60 == pytest.approx(3600 * together.cost.hours, abs=70)
    assert four.worker_seconds - one.worker_seconds == pytest.approx(4 * 3600 * waiting + 3 * 60, rel=0.01)


@pytest.mark.parametrize(
    ("wanted", "changes", "words"),
    [
        (16, {}, r"seed_workers 16 .* up to max_workers 8"),
        ((4, 2), {}, "fewest first"),
        ((3, 8), {}, r"\[3, 8\]: 3 workers do not divide the batch of 1024 sequences"),
        (2, {"submodels.seed_members": 2}, "submodels.seed_members 2 needs one worker"),
        (
            2,
            {**ADAMW, "submodels.optimizer.block_steps": 5, "finetune.keep_optimizer_state": False},
            "block_steps 5 needs one worker",
        ),
        (2, {**ADAMW, "submodels.optimizer.offload_moments": True}, "offload_moments True needs one worker"),
        (
            2,
            {
                "pools.low_memory.types": [
                    {"name": "t4", "resource": "t4", "memory_gb": 16, "price_per_hour": 0.2, "speed": 0.2}
                ]
            },
            "must be of one node type",
        ),
    ],
)
def test_a_number_that_cannot_be_is_refused(wanted: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(wanted, changes=changes)


def test_without_a_seed_no_workers_are_needed_for_it() -> None:
    config = config_of((3, 8), changes={"tokens.seed_share": 0.0, "clusters.vectors": "mean_token"})
    assert {pool.name: workers for pool, workers in config.needed_pools}["low_memory"] == 1
    assert seed_workers(config, VOCABULARY) == (1, 1)
    trained = config_of((2, 8))
    assert {pool.name: workers for pool, workers in trained.needed_pools}["low_memory"] == 2


BIG = {
    "model.config.hidden_size": 2048,
    "model.config.num_hidden_layers": 16,
    "model.config.moe_intermediate_size": 3072,
}


@pytest.mark.parametrize(
    ("memory_gb", "optimizer", "wanted"), [(8, {}, "auto"), (12, ADAMW, "auto"), (16, ADAMW, 2), (24, ADAMW, (1, 8))]
)
def test_settings_that_a_plan_chooses_can_be_stored_and_give_the_same_plan(
    memory_gb: float, optimizer: Any, wanted: Any
) -> None:
    given = config_of(wanted, changes={**optimizer, **BIG, "clusters.count": 8}, memory_gb=memory_gb)
    chosen = fitted(given)
    assert RunConfig.model_validate_json(chosen.model_dump_json()) == chosen
    assert seed_workers(chosen, VOCABULARY) == seed_workers(given, VOCABULARY)
    before, after = seed_plan(given), seed_plan(chosen)
    assert (before.workers, before.fits, before.memory.total) == (after.workers, after.fits, after.memory.total)
    if before.remedy is not None:  # a proposal of settings that the configuration accepts
        raw = given.model_dump(mode="json")
        for setting in before.remedy.settings:
            path, _, value = setting.partition("=")
            put(raw, path, yaml.safe_load(value))
        check_config(raw)
