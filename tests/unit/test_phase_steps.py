"""The steps of a phase's trainings sum to its batches, and the plan prices them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moedisco_ray.core.config import Optimizer, RunConfig, check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan import build_plan, with_cluster_count
from moedisco_ray.plan.steps import unit_steps

BATCH = 1024
RECIPE = Optimizer(batch_tokens=BATCH)
SIZES = st.lists(st.integers(0, 10**9), min_size=1, max_size=40).filter(any)


def config_of(total: int, clusters: int | str, **changes: Any) -> RunConfig:
    return check_config(
        {
            "name": "x",
            "corpus": {"sources": [{"path": "embedded"}]},
            "clusters": {"count": clusters},
            "tokens": {"total": total, **changes.pop("tokens", {})},
            "model": {"config": {"num_experts": 64, "num_experts_per_tok": 1}},
            **changes,
        }
    )


@given(batches=st.integers(1, 10**6), rest=st.integers(0, BATCH - 1), sizes=SIZES)
@example(batches=39, rest=0, sizes=[1] * 40)
@example(batches=64, rest=0, sizes=[10**9, *[1] * 39])
def test_the_steps_sum_to_the_batches_of_the_phase(batches: int, rest: int, sizes: list[int]) -> None:
    steps = unit_steps(batches * BATCH + rest, RECIPE, sizes)
    assert sum(steps) == max(batches, len(sizes))
    assert min(steps) >= 1
    shares = [batches * size / sum(sizes) for size in sizes]
    assert all(own == 1 or own < share + 1 for own, share in zip(steps, shares, strict=True))
    if min(shares) >= 1:
        assert all(abs(own - share) < 1 for own, share in zip(steps, shares, strict=True))


@given(batches=st.integers(40, 10**6), sizes=SIZES)
def test_a_larger_cluster_never_makes_fewer_steps(batches: int, sizes: list[int]) -> None:
    ordered = sorted(zip(sizes, unit_steps(batches * BATCH, RECIPE, sizes), strict=True))
    assert all(fewer <= more for (less, fewer), (size, more) in itertools.pairwise(ordered) if less < size)


def test_one_training_makes_the_whole_batches() -> None:
    assert [unit_steps(n, Optimizer(batch_tokens=100)) for n in (100, 199, 250)] == [[1], [1], [2]]


@given(total=st.integers(10**6, 10**8), clusters=st.sampled_from([2, 8, 32]), members=st.integers(1, 9))
@example(total=1_000_000, clusters=8, members=1)
@example(total=1_228_800, clusters=8, members=8)  # the seed has 15 batches
def test_a_plan_prices_the_whole_batches_of_every_phase(total: int, clusters: int, members: int) -> None:
    config = config_of(total, clusters, submodels={"sync_every": 10, "seed_members": members})
    plan = build_plan(config)
    batch = config.submodels.optimizer.batch_tokens
    assert {stage.stage: stage.cost.tokens for stage in plan.stages} == {
        "seed": config.tokens.seed // batch * batch,
        "submodels": config.tokens.submodels // batch * batch,
        "finetune": config.tokens.finetune // batch * batch,
    }
    assert plan.tokens == sum(stage.cost.tokens for stage in plan.stages)
    assert total - 3 * batch < plan.tokens <= total
    assert plan.joint_training.cost.tokens == plan.tokens
    for stage in plan.stages:
        assert stage.steps == -(-stage.cost.tokens // (batch * stage.units))


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (
            1_000_000,
            "650,000 tokens to the sub-models, less than 64 batches of 16,384; raise it, or lower {} or clusters.count",
        ),
        (80_000, "16,000 tokens to the seed, less than one batch of 16,384; raise it, or lower {}"),
    ],
)
def test_a_phase_with_fewer_batches_than_trainings_is_refused(total: int, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(total, 64)
    assert str(refusal.value) == f"tokens.total: {total} leaves {message.format('submodels.optimizer.batch_tokens')}"


def test_the_number_of_clusters_is_checked_when_it_is_chosen() -> None:
    config = config_of(120_000, "auto", tokens={"seed_share": 0.5, "finetune_share": 0.3})
    with pytest.raises(ConfigError, match=r"24,000 tokens to the sub-models, less than 2 batches of 16,384"):
        with_cluster_count(config)
