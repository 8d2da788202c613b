"""Plans of streamed training: card, host and time; and the settings that it refuses."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest

from docs.plans import CHECKPOINTS
from moedisco_ray.core.config import HighMemoryPool, Optimizer, RunConfig, check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan import StagePlan, build_plan
from moedisco_ray.plan.memory import GIB
from moedisco_ray.plan.streamed_memory import streamed_memory
from moedisco_ray.plan.streamed_way import on_cards, streamed_step
from moedisco_ray.plan.streaming import Host, step_time, step_work

SHAPES = ("Qwen1.5-MoE-A2.7B", "OLMoE-1B-7B", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "gpt-oss-20b")
RECIPE = {"name": "muon", "precision": "pure_bf16", "batch_tokens": 65_536, "micro_batch": 4}


def config_on(checkpoint: str, memory: str = "streamed", card: str = "RTX 4090", **changes: Any) -> RunConfig:
    """Joint training of a published checkpoint's shape on one card."""
    family, vocabulary, sizes = CHECKPOINTS[checkpoint]
    recipe = {**RECIPE, **changes.pop("recipe", {})}
    pool = {"gpu": 1, "card": card, "memory": memory, **changes.pop("pool", {})}
    return check_config(
        {
            "name": "plan",
            "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 1024},
            "model": {"family": family, "config": sizes.model_dump(exclude_unset=True) | {"vocab_size": vocabulary}},
            "tokens": {"total": 65_536_000, "seed_share": 0.0, "finetune_share": 1.0},
            "clusters": {"count": 4},
            "submodels": {"optimizer": recipe},
            "finetune": {"optimizer": recipe},
            "pools": {"low_memory": {"gpu": 1, "card": card}, "high_memory": pool},
            **changes,
        }
    )


def joint(config: RunConfig) -> StagePlan:
    [stage] = build_plan(config).stages
    return stage


@pytest.mark.parametrize("checkpoint", SHAPES)
def test_a_cheap_card_has_room_for_the_whole_moe_and_keeps_its_speed(checkpoint: str) -> None:
    family, vocabulary, sizes = CHECKPOINTS[checkpoint]
    recipe, pool = Optimizer.model_validate(RECIPE), HighMemoryPool(gpu=1, card="RTX 4090")
    assert streamed_memory(family, sizes, vocabulary, recipe, sequence_length=1024, gpu=1).total < 16 * GIB
    assert 0.95 < streamed_step(family, sizes, vocabulary, recipe, pool, sequence_length=1024).kept < 1


def test_a_plan_fits_streamed_and_not_otherwise() -> None:
    streamed, resident = (joint(config_on("OLMoE-1B-7B", memory)) for memory in ("streamed", "resident"))
    assert streamed.fits
    assert streamed.choice is None
    assert not resident.fits


def test_the_host_holds_six_bytes_per_parameter_and_the_inputs_of_the_layers() -> None:
    config = config_on("OLMoE-1B-7B")
    plan = build_plan(config)
    [stage] = plan.stages
    inputs = 16 * 65_536 * 2048 * 2
    ends = 2 * (stage.parameters.total - stage.parameters.matrices)  # AdamW's second moment
    assert stage.memory.host == 6 * stage.parameters.total + ends + inputs
    found = {each.stage: each for each in plan.storage}["finetune"]
    assert found.worker_memory == stage.memory.host  # a checkpoint is written without a copy
    assert found.stored == 2 * stage.parameters.total


@pytest.mark.parametrize(("host_gb", "fits"), [(64, True), (32, False)])
def test_a_machine_without_the_memory_is_refused(host_gb: int, fits: bool) -> None:
    stage = joint(config_on("OLMoE-1B-7B", pool={"host_memory_gb": host_gb}))
    assert stage.fits is fits
    if not fits:
        assert "finetune streams from 43.1 GiB per card" in str(stage.problem)
        assert "host_memory_gb" in str(stage.problem)
        assert "workers=" not in str(stage.problem)  # the remedy


def test_the_time_of_a_plan_is_that_of_the_timeline() -> None:
    streamed = joint(config_on("OLMoE-1B-7B"))
    recomputed = joint(config_on("OLMoE-1B-7B", "resident", recipe={"gradient_checkpointing": True}))
    assert 0.95 < recomputed.cost.hours / streamed.cost.hours < 1
    few = joint(config_on("OLMoE-1B-7B", recipe={"batch_tokens": 1024, "micro_batch": 1, "name": "adamw"}))
    assert few.cost.hours > 4 * streamed.cost.hours  # the card waits for the copies


def test_the_hours_are_those_of_the_steps() -> None:
    """Before: they were not, because Muon's operations had another speed in each."""
    config, (family, vocabulary, sizes) = config_on("OLMoE-1B-7B"), CHECKPOINTS["OLMoE-1B-7B"]
    planned, recipe = joint(config), config.finetune.optimizer
    step = streamed_step(family, sizes, vocabulary, recipe, config.pools.high_memory, sequence_length=1024)
    assert planned.cost.hours == pytest.approx(step.seconds * planned.cost.tokens / 65_536 / 3600)


def test_the_cards_of_a_machine_divide_the_layers() -> None:
    """Each card needs the memory of one alone and of what passes between them, as does the machine."""
    box = {"workers": 8, "gpus_per_node": 8, "host_memory_gb": 512}
    recipe = {"batch_tokens": 524_288}
    one, eight = (
        joint(config_on("Qwen3-30B-A3B", pool=pool, recipe=recipe)) for pool in ({"host_memory_gb": 512}, box)
    )
    assert (eight.fits, eight.workers, eight.traffic) == (True, 8, None)
    assert 0.9 < one.cost.hours / (8 * eight.cost.hours) < 1
    assert eight.cost.worker_hours == pytest.approx(8 * eight.cost.hours)
    states = 524_288 * 2048 * 2
    assert one.memory.total + 2 * states <= eight.memory.total < one.memory.total + 3 * states
    assert eight.host_gb == one.host_gb == pytest.approx(0.95 * 512 - 3)
    between = 9 * states + 8 * 151_936 * 2048 * 2
    assert eight.memory.host == one.memory.host + between


def test_several_cards_get_micro_batches_enough_for_all_of_them() -> None:
    """Before: without the setting a step had one micro-batch, which went from card to card alone."""
    config = config_on("OLMoE-1B-7B", pool={"workers": 4, "gpus_per_node": 4}, recipe={"micro_batch": None})
    recipe = on_cards(config.finetune.optimizer, config.pools.high_memory, 1024)
    assert recipe.micro_batch == 64 // (2 * 4)
    alone = config.pools.high_memory.model_copy(update={"workers": 1})
    assert on_cards(config.finetune.optimizer, alone, 1024).micro_batch is None
    sizes = CHECKPOINTS["OLMoE-1B-7B"][2]
    work = step_work("olmoe", sizes, 50_304, config.finetune.optimizer, sequence_length=1024, gpu=1)
    layers = dataclasses.replace(work, update_flops=0, head=0)
    host = Host(math.inf, math.inf, math.inf, math.inf, math.inf)
    by_layers = functools.partial(step_time, flops=1e14, host=host, division="layers")
    one, four = (by_layers(layers, cards=cards).seconds for cards in (1, 4))
    assert four == pytest.approx(one)  # one micro-batch is in one layer at a time
    assert by_layers(dataclasses.replace(layers, micro_batch=8 * 1024), cards=4).seconds < one / 2.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pool": {"workers": 2}},
            r"pools\.high_memory\.memory.*on one machine, which has 1 of the pool's 2 workers; set .*workers to 1",
        ),
        (
            {"pool": {"workers": [1, 4], "gpus_per_node": 4}},
            r"pools\.high_memory\.memory.*needs a fixed number of workers, not \[1, 4\]",
        ),
        ({"recipe": {"compile": True}}, r"finetune\.optimizer\.compile.*needs the weights on the card"),
        (
            {
                "pools": {"low_memory": {"memory": "streamed", "seed_workers": 2}},
                "tokens": {"total": 65_536_000, "seed_share": 0.5},
            },
            r"seed_workers.* pools\.low_memory\.memory streamed needs one worker",
        ),
    ],
)
def test_what_needs_weights_on_the_card_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_on("OLMoE-1B-7B", **changes)
