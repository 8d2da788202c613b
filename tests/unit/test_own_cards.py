"""Plans on cards that the user owns: hours and energy in place of dollars, idle cards, and the host's memory."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from rich.console import Console

from moedisco_ray.cli.display.plan import plan_view
from moedisco_ray.core.cards import CARDS
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.presets import LocalCard, on_own_cards, preset_text
from moedisco_ray.core.records.bill import format_seconds
from moedisco_ray.plan import Plan, build_plan, too_large
from moedisco_ray.plan.fitting import CHANGEABLE
from moedisco_ray.plan.own_cards import idle_cards, kilowatt_hours

FOUR_4090 = {"card": "RTX 4090", "memory_gb": None, "price_per_hour": 0, "max_workers": 4, "gpus_per_node": 4}


def config_of(low: dict[str, Any] = FOUR_4090, pool: str = "low_memory", **optimizer: Any) -> RunConfig:
    raw = yaml.safe_load(preset_text("default")) | {"recipe": None}
    raw["pools"]["low_memory"] |= low
    raw["finetune"]["pool"] = pool
    raw["submodels"]["optimizer"] |= optimizer
    raw["finetune"]["optimizer"] |= {key: optimizer[key] for key in ("name",) if key in optimizer}
    return check_config(raw)


def own(**low: Any) -> Plan:
    return build_plan(config_of(FOUR_4090 | low))


def text_of(plan: Plan) -> str:
    console = Console(width=240)
    with console.capture() as text:
        console.print(plan_view(plan))
    return text.get()


def test_own_cards_are_compared_by_time_and_energy_without_dollars_or_percentages() -> None:
    """Before: `$0.00 in 16 min 20 s`, and a saving of 100 % against rented cards."""
    plan = own()
    ways = [way for way in plan.alternatives if way.limit is None and way.dollars == 0]
    fastest = min(ways, key=lambda way: way.seconds or 0)
    assert plan.verdict is not None
    assert f"{fastest.name} is faster" in plan.verdict
    assert f"{format_seconds(fastest.seconds)} and {fastest.kilowatt_hours:.1f} kWh" in plan.verdict
    assert "$" not in plan.verdict
    assert "%" not in plan.verdict
    assert (plan.bill.saving, plan.bill.baseline, plan.bill.dollars) == (None, None, 0)


def test_own_small_cards_next_to_rented_large_ones_have_no_saving() -> None:
    plan = build_plan(config_of(pool="high_memory"))
    assert plan.bill.dollars
    assert (plan.bill.saving, plan.bill.baseline) == (None, None)


def test_energy_is_that_of_the_cards_at_work() -> None:
    """450 W of an RTX 4090 (data sheet), for the hours of its workers; 0.4 kW x 2 h of an A100 are 0.8 kWh."""
    config = config_of(pool="high_memory")
    lines = build_plan(config).bill.lines
    held = dict.fromkeys(config.pools.by_key, 0.0)
    for line in lines:
        if line.pool in held:
            held[line.pool] += (line.worker_seconds or 0) / 3600
    assert kilowatt_hours(lines, config) == pytest.approx(0.45 * held["low_memory"] + 0.4 * held["high_memory"])
    assert all(0 < card.watts <= 1000 for card in CARDS)


def test_the_energy_of_a_card_without_a_name_is_unknown() -> None:
    plan = own(card=None, memory_gb=24, speed=0.7)
    assert {way.kilowatt_hours for way in plan.alternatives if way.way != "joint_high_memory"} == {None}
    assert plan.verdict is not None
    assert "kWh" not in plan.verdict


def test_workers_without_cards_have_no_energy() -> None:
    """Before: `0.0` kWh for hours of computing."""
    plan = build_plan(check_config(yaml.safe_load(preset_text("demo"))))
    assert {way.kilowatt_hours for way in plan.alternatives} == {None}
    assert "kWh" not in text_of(plan)


def test_a_plan_of_own_cards_has_no_column_of_dollars_and_no_cards_that_do_not_exist() -> None:
    """Before: `$0.00` in every row, and what joint training on an imagined A100 would store."""
    raw = yaml.safe_load(on_own_cards(preset_text("default"), [LocalCard("NVIDIA GeForce RTX 4090", 24.0)] * 4, 64))
    text = text_of(build_plan(check_config(raw)))
    [head] = [line for line in text.splitlines() if line.startswith("ways to train it")]
    assert head.split()[4:6] == ["time", "kWh"]
    assert "joint training  " not in text
    rented = text_of(build_plan(config_of({})))
    assert "joint training  " in rented
    assert "dollars  kWh" in rented


def test_idle_cards_are_said() -> None:
    """One card trains the seed, four fifths of the run, while three wait.

    Before: nothing.
    """
    config = config_of(FOUR_4090 | {"seed_workers": 1})
    plan = build_plan(config)
    [idle] = plan.idle
    seconds = {each.stage: each.seconds or 0.0 for each in plan.estimates}
    alone = [each for each in plan.estimates if (each.worker_seconds or 0) <= 1.01 * (each.seconds or 0)]
    assert (idle.cards, idle.idle) == (4, 3)
    assert idle.share == pytest.approx(sum(seconds[each.stage] for each in alone) / sum(seconds.values()))
    assert idle.share > 0.6
    assert f"3 of 4 low-memory cards are idle for {100 * idle.share:.0f} % of the time" in text_of(plan)


def test_a_single_card_that_always_works_is_not_idle() -> None:
    config = config_of(FOUR_4090 | {"max_workers": 1, "gpus_per_node": 1})
    assert idle_cards(config, build_plan(config).estimates, config) == ()


@pytest.mark.parametrize("section", ["submodels", "finetune"])
def test_the_default_preset_pins_no_setting_that_makes_a_model_fit(section: str) -> None:
    """Before: `gradient_checkpointing: false`, which kept a model of 30 billion parameters from fitting."""
    optimizer = yaml.safe_load(preset_text("default"))[section]["optimizer"]
    assert {optimizer.get(name) for name in set(CHANGEABLE) - {"micro_batch"}} <= {None, "auto"}


LARGE = {
    "family": "qwen3_moe",
    "config": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "moe_intermediate_size": 1408,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32_000,
    },
    "init": "random",
}


def large(host_memory_gb: float | None, **optimizer: Any) -> Plan:
    """A shape whose sub-models of 2 experts fit a card of 18 GB at best with their moments elsewhere."""
    raw = config_of(
        FOUR_4090 | {"memory_gb": 18, "host_memory_gb": host_memory_gb, "seed_workers": 1}, name="adamw", **optimizer
    ).model_dump()
    return build_plan(check_config(raw | {"model": LARGE, "clusters": raw["clusters"] | {"count": 4}}))


def test_moments_are_offloaded_only_where_the_host_has_room_for_them() -> None:
    """Before: `offload_moments=true` whatever the machine had."""
    pinned = {"precision": "bf16", "moments": "full"}
    roomy, unknown = large(128, **pinned), large(None, **pinned)
    assert roomy.stages == tuple(
        each.model_copy(update={"host_memory_gb": 128, "host_gb": 0.95 * 128 / 4 - 3}) for each in unknown.stages
    )
    [seed] = [stage for stage in roomy.stages if stage.stage == "seed"]
    assert seed.choice is not None
    assert "submodels.optimizer.offload_moments=true" in seed.choice.settings
    tight = next(stage for stage in large(16, **pinned).stages if stage.stage == "seed")
    assert tight.host_gb == pytest.approx(0.8)  # 0.95 of 16 GB for four workers, of which each process takes 3 GB
    assert tight.choice is None or "submodels.optimizer.offload_moments=true" not in tight.choice.settings


def test_a_stage_that_must_offload_names_the_machines_memory() -> None:
    plan = large(
        16,
        precision="bf16",
        moments="full",
        offload_moments=True,
        gradient_checkpointing=True,
        block_steps=0,
        micro_batch=16,
    )
    [seed] = [stage for stage in too_large(plan) if stage.stage == "seed"]
    assert str(seed.problem).startswith("pools.low_memory.host_memory_gb: 16.0: seed offloads ")
    assert "its machine has room for 0.8 GiB each" in str(seed.problem)
    assert plan.alternatives[-1].limit == seed.shortage
    assert seed.shortage in text_of(plan)


def test_own_cards_are_not_more_than_the_machine_has() -> None:
    """Before: `--set pools.low_memory.max_workers=8`, of four cards; and of four machines with a card each, one."""

    def remedy(price: float, **pool: Any) -> str:
        raw = config_of(FOUR_4090 | {"memory_gb": 4, "price_per_hour": price} | pool).model_dump()
        raw |= {"model": LARGE, "tokens": raw["tokens"] | {"seed_share": 0, "finetune_share": 1}}
        [stage] = build_plan(check_config(raw | {"clusters": raw["clusters"] | {"count": 4}})).stages
        return str(stage.remedy)

    assert "pools.low_memory.max_workers=8" in remedy(0.35)
    assert remedy(0).startswith("no setting makes it fit")
    assert "max_workers" not in remedy(0)
    assert "pools.low_memory.max_workers=8" in remedy(0, gpus_per_node=1)
    assert "max_workers" not in remedy(0, gpus_per_node=1, max_workers=1)
