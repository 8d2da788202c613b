"""What a plan says of other ways to train the model on the same machines, and that its sentence fits its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from docs.comparisons import MACHINES, PUBLISHED, Published, config_on, plan_on
from moedisco_ray.cli.app import app
from moedisco_ray.core.config import check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.bill import format_dollars, format_seconds
from moedisco_ray.plan import Alternative, Plan, build_plan

RUNNER = CliRunner()


def default(**pools: Any) -> Plan:
    raw = yaml.safe_load(preset_text("default"))
    for name, changes in pools.items():
        raw["pools"][name] |= changes
    return build_plan(check_config(raw))


def figures(way: Alternative) -> str:
    return f"{format_dollars(way.dollars)} in {format_seconds(way.seconds)}"


def check_verdict(plan: Plan) -> None:
    """The verdict names the cheapest way of the table that fits, with the table's figures."""
    assert plan.verdict is not None
    run = plan.alternatives[-1]
    fitting = [way for way in plan.alternatives if way.limit is None]
    assert all(way.dollars is None and way.seconds is None for way in plan.alternatives if way.limit is not None)
    if run.limit is not None:
        assert "does not fit" in plan.verdict
        assert not plan.bill.lines
        assert plan.bill.dollars is None
        assert all(figures(way) in plan.verdict for way in fitting if way is min(fitting, key=lambda way: way.dollars))
        return
    assert run.dollars == pytest.approx(plan.bill.dollars)
    assert figures(run) in plan.verdict
    cheapest = min(fitting, key=lambda way: way.dollars or 0)
    assert ("this run costs least" in plan.verdict) == (run.dollars <= (cheapest.dollars or 0))
    if cheapest.dollars < run.dollars:
        assert f"{cheapest.name} is cheaper" in plan.verdict
        assert figures(cheapest) in plan.verdict


def test_the_verdict_on_the_default_preset_agrees_with_its_table() -> None:
    check_verdict(default())


@pytest.mark.parametrize("machines", MACHINES)
@pytest.mark.parametrize("checkpoint", [None, "OLMoE-1B-7B", "gpt-oss-20b", "Mixtral-8x7B"])
def test_the_verdict_agrees_with_the_arithmetic_of_the_table(machines: str, checkpoint: str | None) -> None:
    check_verdict(plan_on(machines, checkpoint))


@settings(deadline=None, max_examples=25)
@given(low=st.floats(0.01, 5), high=st.floats(0.01, 50), workers=st.sampled_from([1, 2, 8]))
def test_the_verdict_agrees_with_the_table_at_any_price(low: float, high: float, workers: int) -> None:
    check_verdict(default(low_memory={"price_per_hour": low}, high_memory={"price_per_hour": high, "workers": workers}))


def test_the_default_recipe_is_not_called_cheap_where_one_of_its_cards_trains_the_model_for_less(
    tmp_path: Path,
) -> None:
    """Before (a0c02aba): `50 % cheaper than joint training`, and no line named one cheap card alone."""
    path = tmp_path / "default.yaml"
    path.write_text(preset_text("default"))
    done = RUNNER.invoke(app, ["plan", str(path)])
    text = " ".join(done.stdout.split())
    assert "% cheaper than joint training" not in text
    assert "is cheaper, because one cheap card trains the whole model: $" in text
    assert done.exit_code == 0


def test_large_cards_alone_are_named_where_they_cost_least() -> None:
    plan = default(
        low_memory={"price_per_hour": 0.33}, high_memory={"card": "H100", "memory_gb": 79.1, "price_per_hour": 2.6}
    )
    assert plan.verdict is not None
    assert plan.verdict.startswith(
        "On these machines joint training on 1 x H100 is cheaper, so rent the large cards alone: $"
    )


def test_own_cards_are_compared_by_time() -> None:
    plan = default(low_memory={"price_per_hour": 0}, high_memory={"price_per_hour": 0})
    fastest = min(plan.alternatives, key=lambda way: way.seconds or 0)
    assert plan.verdict is not None
    assert f"{fastest.name} is faster" in plan.verdict


def test_what_does_not_fit_has_no_bill_and_ends_with_2(tmp_path: Path) -> None:
    """Before (a0c02aba): exit code 0, and `Planned: $0.4599. 44 % cheaper than joint training`."""
    path = tmp_path / "default.yaml"
    path.write_text(preset_text("default"))
    done = RUNNER.invoke(app, ["plan", str(path), "--json", "--set", "pools.low_memory.memory_gb=1"])
    assert done.exit_code == 2
    assert "pools.low_memory.memory_gb: 1.0: a worker of " in done.stderr
    bill = json.loads(done.stdout)["bill"]
    assert (bill["dollars"], bill["seconds"], bill["lines"]) == (None, None, [])
    text = RUNNER.invoke(app, ["plan", str(path), "--set", "pools.low_memory.memory_gb=1"]).stdout
    assert "This run does not fit these machines (" in text
    assert "1 x A100-80GB does: $" in " ".join(text.split())


def test_a_way_that_does_not_fit_names_its_limit() -> None:
    ways = plan_on("8 spot L4", "Qwen3-30B-A3B").alternatives
    assert [way.limit for way in ways if way.way == "joint_low_memory"] == [
        "finetune needs 112.6 of 22.05 GiB per card"
    ]


def test_ways_without_large_cards_are_of_the_cheap_ones() -> None:
    assert {way.way for way in plan_on("8 spot L4").alternatives} == {"joint_low_memory", "without_submodels", "run"}


def test_both_sides_have_the_layout_of_the_nodes() -> None:
    """Before (a0c02aba): 792 GiB per worker and step, so joint training took 12.0 h and $250."""
    joint = plan_on("8 x H100 in one node", "Qwen3-30B-A3B").joint_training
    apart = config_on("8 x H100 in one node", "Qwen3-30B-A3B")
    high = apart.pools.high_memory.model_copy(update={"gpus_per_node": 1})
    single = build_plan(apart.model_copy(update={"pools": apart.pools.model_copy(update={"high_memory": high})}))
    assert joint.traffic is not None
    assert single.joint_training.traffic is not None
    assert joint.traffic.bytes == joint.traffic.divided < joint.traffic.sharded / 3
    assert joint.traffic.seconds < 1 < single.joint_training.traffic.seconds
    assert joint.cost.hours < 3.2  # published throughputs: about 3 hours and 62 dollars
    assert joint.cost.dollars == pytest.approx(62, rel=0.2)


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"{run.name} on {run.cards} {run.card}")
def test_a_plan_is_within_a_fifth_of_published_throughputs(run: Published) -> None:
    assert run.planned == pytest.approx(run.tokens_per_second, rel=0.2), run.source
