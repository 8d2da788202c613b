"""What a plan says of other ways to train the model on the same machines, and that its sentence fits its table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from docs.comparisons import FAR, MACHINES, PUBLISHED, Published, config_on, plan_on, way_rows
from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.presets import LocalCard, on_own_cards, preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.bill import format_dollars, format_seconds
from moedisco_ray.core.records.ways import verdict
from moedisco_ray.execution.run_directory import create, write_config
from moedisco_ray.plan import Alternative, Plan, StagePlan, build_plan, decided
from moedisco_ray.plan.resolve import resolve

RUNNER = CliRunner()
NOT_COMPARED = ("half", "members")
"""Another model, and one whose loss is not known."""


def default(recipe: str | None = None, **pools: Any) -> Plan:
    raw = yaml.safe_load(preset_text("default")) | {"recipe": recipe}
    for name, changes in pools.items():
        raw["pools"][name] |= changes
    return build_plan(check_config(raw))


def figures(way: Alternative) -> str:
    return f"{format_dollars(way.dollars)} in {format_seconds(way.seconds)}"


def comparable(ways: Sequence[Alternative]) -> list[Alternative]:
    """Ways without those that round, if that saves less than a third of what joint training or the run costs."""
    weighed = [
        way
        for way in ways
        if way.dollars is not None
        and way.way != "members"
        and (way.rounded or way.way.startswith(("joint", "str", "run")))
    ]
    exact = min((way.dollars for way in weighed if not way.rounded), default=float("inf"))
    keeps = exact > 1.5 * min((way.dollars for way in weighed), default=0.0)
    return [way for way in ways if not way.rounded or keeps]


def check_verdict(plan: Plan) -> None:
    """The verdict names the cheapest way of the table that fits, with the table's figures."""
    assert plan.verdict is not None
    run = plan.alternatives[-1]
    fitting = [way for way in plan.alternatives if way.limit is None and way.way not in NOT_COMPARED]
    assert all(way.dollars is None and way.seconds is None for way in plan.alternatives if way.limit is not None)
    if run.limit is not None:
        assert "does not fit" in plan.verdict
        assert not plan.bill.lines
        assert plan.bill.dollars is None
        if fitting:
            assert figures(min(comparable(fitting), key=lambda way: way.dollars or 0)) in plan.verdict
        return
    assert run.dollars == pytest.approx(plan.bill.dollars)
    assert figures(run) in plan.verdict
    cheapest = min(comparable(fitting), key=lambda way: way.dollars or 0)
    is_least = run in comparable(fitting) and run.dollars <= (cheapest.dollars or 0)
    assert ("this run costs least" in plan.verdict) == is_least
    if cheapest.dollars < run.dollars:
        assert f"{cheapest.name} is cheaper" in plan.verdict
        assert figures(cheapest) in plan.verdict


@pytest.mark.parametrize("machines", MACHINES)
@pytest.mark.parametrize("checkpoint", [None, "Qwen3-30B-A3B"])
def test_the_verdict_agrees_with_the_arithmetic_of_the_table(machines: str, checkpoint: str | None) -> None:
    plan = plan_on(machines, checkpoint)
    check_verdict(plan)
    assert plan.verdict is not None
    bold = [row for row in way_rows(plan) if row[0].startswith("**")]
    whole = [
        way.dollars for way in comparable(plan.alternatives) if way.dollars is not None and way.way not in NOT_COMPARED
    ]
    assert len(bold) == bool(whole)
    for name, _, dollars, *_ in bold:
        assert name.strip("*") in plan.verdict
        assert float(dollars.replace(",", "")) == pytest.approx(min(whole), abs=0.006)


@settings(deadline=None, max_examples=examples(5, 25))
@given(low=st.floats(0.01, 5), high=st.floats(0.01, 50), workers=st.sampled_from([1, 2, 8]))
def test_the_verdict_agrees_with_the_table_at_any_price(low: float, high: float, workers: int) -> None:
    check_verdict(default(low_memory={"price_per_hour": low}, high_memory={"price_per_hour": high, "workers": workers}))


def test_the_default_recipe_is_not_called_cheap_where_one_of_its_cards_trains_the_model_for_less(
    tmp_path: Path,
) -> None:
    """Before (a0c02aba): `50 % cheaper than joint training`, and no line named one cheap card alone."""
    path = tmp_path / "default.yaml"
    path.write_text(preset_text("default"))
    done = RUNNER.invoke(app, ["plan", str(path), "--set", "recipe=null"])
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


def test_what_does_not_fit_has_no_bill_and_ends_with_2(tmp_path: Path) -> None:
    """Before (a0c02aba): exit code 0, and `Planned: $0.4599. 44 % cheaper than joint training`."""
    path = tmp_path / "default.yaml"
    path.write_text(preset_text("default").replace("recipe: auto", "recipe: null"))
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
        "finetune needs 31.5 of 22.05 GiB per card"  # 21 of weights in bf16, gradients and Muon's state
    ]


def test_ways_without_large_cards_are_of_the_cheap_ones() -> None:
    assert {way.way for way in plan_on("8 spot L4").alternatives} == {
        "joint_low_memory", "members", "grown", "half", "without_submodels", "run",
    }  # fmt: skip


def test_joint_training_with_adamw_takes_what_was_published() -> None:
    """Before (a0c02aba): 792 GiB per worker and step, so joint training took 12.0 h and $250."""

    def joint_training(gpus_per_node: int) -> StagePlan:
        raw = config_on("8 x H100 in one node", "Qwen3-30B-A3B").model_dump()
        for section in ("submodels", "finetune"):
            raw[section]["optimizer"]["name"] = "adamw"  # as those who published throughputs
        raw["pools"]["high_memory"]["gpus_per_node"] = gpus_per_node
        return build_plan(check_config(raw)).joint_training

    joint, apart = joint_training(8), joint_training(1)
    assert joint.traffic is not None
    assert apart.traffic is not None
    assert joint.traffic.bytes == joint.traffic.divided < joint.traffic.sharded / 3
    assert joint.traffic.seconds < 0.3 < apart.traffic.seconds / 1.5  # both exchange once per step
    assert joint.cost.hours < 3.2  # published throughputs: about 3 hours and 62 dollars
    assert joint.cost.dollars == pytest.approx(62, rel=0.2)


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"{run.name} on {run.cards} {run.card}")
def test_a_plan_is_within_a_fifth_of_published_throughputs(run: Published) -> None:
    assert run.planned == pytest.approx(run.tokens_per_second, rel=0.2), run.source


@pytest.mark.parametrize("run", FAR, ids=lambda run: f"{run.name} on {run.cards} {run.card}")
def test_a_figure_is_called_far_only_if_it_is_and_with_a_reason(run: Published) -> None:
    assert run.planned != pytest.approx(run.tokens_per_second, rel=0.2), run.source
    assert len(run.why.split()) > 5


def test_a_gang_takes_settings_that_exchange_once_per_step_where_the_network_is_slow() -> None:
    """Before: 614 GB per worker and step, all weights for each of 16 sequences, in 2,236 h and $2,951."""
    [small, _] = [way for way in plan_on("8 spot L4", "OLMoE-1B-7B").alternatives if way.way == "joint_low_memory"]
    assert small.name == "joint training on 4 x L4"
    assert small.dollars == pytest.approx(184, rel=0.05)


@pytest.fixture(autouse=True, scope="module")
def no_earlier_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Elsewhere: a run below `runs/` with the preset's name has recorded its way, and keeps it."""
    with contextlib.chdir(tmp_path_factory.mktemp("alternatives")):
        yield


def decide(**changes: Any) -> RunConfig:
    raw = yaml.safe_load(preset_text("default"))
    for name, values in changes.items():
        raw[name] = {**raw[name], **values} if isinstance(values, dict) else values
    return decided(check_config(raw))[0]


def pools(**changes: dict[str, Any]) -> dict[str, Any]:
    raw = yaml.safe_load(preset_text("default"))["pools"]
    return {name: {**raw[name], **values} for name, values in changes.items()}


def test_the_default_preset_trains_jointly_on_one_cheap_card_and_says_why() -> None:
    """Before: the preset's sub-models, which cost more and end at a higher loss."""
    config = decide()
    assert (config.tokens.seed, config.tokens.submodels, config.tokens.finetune) == (0, 0, config.tokens.total)
    assert (config.finetune.pool, config.pools.low_memory.max_workers, config.recipe) == ("low_memory", 1, None)
    plan = default("auto")
    assert plan.recipe == "recipe auto: joint training on 1 x L4, because the whole model fits there"
    run = plan.alternatives[-1]
    assert run.name == "this run: joint training on 1 x L4"
    assert plan.verdict is not None
    assert plan.verdict.startswith(f"On these machines this run costs least: {figures(run)}, against ")
    assert {way.way for way in plan.alternatives} == {
        "joint_high_memory", "joint_low_memory", "members", "grown", "half", "without_submodels", "submodels", "run",
    }  # fmt: skip


@pytest.mark.parametrize("recipe", ["auto", "joint"])
def test_joint_training_is_on_the_cards_that_cost_least_for_it(recipe: str) -> None:
    config = decide(recipe=recipe, pools=pools(high_memory={"price_per_hour": 0.2}))
    assert (config.finetune.pool, config.pools.high_memory.workers) == ("high_memory", 1)


FITS = "the whole model fits there"


@pytest.mark.parametrize(
    ("low", "high", "reason"),
    [
        ("resident", "resident", FITS),
        ("resident", "streamed", FITS),
        ("streamed", "resident", f"{FITS}, and what the ways cost on CPUs is unknown before the run"),
    ],
)
def test_without_gpus_the_low_memory_workers_train(low: str, high: str, reason: str) -> None:
    """Costs of CPU workers are unknown here. Before: a streaming high-memory worker for 7 times the dollars."""
    raw = yaml.safe_load(preset_text("demo")) | {"recipe": "joint"}
    raw["pools"]["low_memory"] |= {"memory": low}
    raw["pools"]["high_memory"] |= {"memory": high}
    config, chosen = decided(check_config(raw))
    assert (config.finetune.pool, config.pools.low_memory.max_workers) == ("low_memory", 1)
    assert chosen is not None
    assert chosen.reason == reason


def test_a_seed_grows_where_that_reaches_the_loss_of_joint_training_for_less() -> None:
    large = yaml.safe_load(preset_text("default"))["model"]
    large["config"] |= {"hidden_size": 1024, "num_hidden_layers": 16, "moe_intermediate_size": 2048, "num_experts": 32}
    small = {"memory_gb": 12.0, "price_per_hour": 0.05, "max_workers": 1}  # several would train all of it
    config = decide(model=large, pools=pools(low_memory=small))
    assert (config.tokens.seed_share, config.tokens.finetune_share) == (0.5, 0.5)
    assert decide(recipe="joint", model=large, pools=pools(low_memory=small)).tokens.finetune_share == 1
    dear = decide(model=large, pools=pools(low_memory=small | {"price_per_hour": 5.0}))
    assert (dear.tokens.finetune_share, dear.finetune.pool) == (1, "high_memory")


def test_what_needs_submodels_keeps_them() -> None:
    """Before: the verdict on such a run promised joint training `with recipe: auto`."""
    assert decide(export={"keep_apart": "always"}).tokens.decoupled
    assert decide(recipe=None).tokens.seed_share == 0.8
    raw = yaml.safe_load(preset_text("default")) | {"recipe": None}
    assert "`recipe: auto` takes such a way." in str(build_plan(check_config(raw)).verdict)
    raw["export"]["keep_apart"] = "always"
    assert "recipe: auto" not in str(build_plan(check_config(raw)).verdict)


def shape_on(checkpoint: str, *, recipe: str | None = "auto", large: dict[str, Any] | None = None, **low: Any) -> Plan:
    """The default preset with a published shape, on small cards and maybe large ones."""
    raw = config_on("8 spot L4", checkpoint).model_dump() | {"recipe": recipe}
    raw["pools"]["low_memory"] |= {"card": "RTX 4090", "memory_gb": None, "speed": None, **low}
    if large is not None:
        raw["pools"]["high_memory"] |= {"gpu": 1, "memory_gb": None, "speed": None, **large}
        raw["finetune"]["pool"] = "high_memory"
    return build_plan(check_config(raw))


TWO_BOXES = {"price_per_hour": 0.35, "max_workers": 4, "gpus_per_node": 2, "network": 1, "host_memory_gb": 128}


def test_one_card_that_streams_is_compared_with_several_that_hold_the_model() -> None:
    """Before: $534 and a loss 0.03 higher, because four cards hold the model over 1 Gbit/s."""
    plan = shape_on("OLMoE-1B-7B", **TWO_BOXES)
    run = plan.alternatives[-1]
    assert run.name == "this run: joint training on 1 x RTX 4090, streamed from main memory"
    assert (run.gap, run.limit) == (0.0, None)
    assert run.dollars == pytest.approx(45, rel=0.05)
    assert plan.recipe is not None
    assert plan.recipe.endswith("because that costs less than with the weights on cards")
    [together] = [way for way in plan.alternatives if way.way == "joint_low_memory"]
    assert (together.limit, together.name) == (None, "joint training on 4 x RTX 4090")
    assert (together.dollars or 0) > 10 * (run.dollars or 0)
    fast = shape_on("OLMoE-1B-7B", **TWO_BOXES | {"price_per_hour": 0, "max_workers": 8, "gpus_per_node": 8})
    assert fast.alternatives[-1].name == "this run: joint training on 8 x RTX 4090"
    assert [(way.workers, way.limit) for way in fast.alternatives if way.way == "streamed"] == [(1, None), (8, None)]


def test_a_training_that_streams_has_the_memory_of_the_whole_machine_and_its_cards() -> None:
    """Before: an eighth of it, so that 512 GB were too few for 30 billion parameters; then one card of the eight."""
    box = {"price_per_hour": 0, "max_workers": 8, "gpus_per_node": 8, "host_memory_gb": 512}
    plan = shape_on("Qwen3-30B-A3B", **box)
    run = plan.alternatives[-1]
    assert run.name == "this run: joint training on 8 x RTX 4090, streamed from main memory"
    assert run.limit is None
    assert [stage.host_gb for stage in plan.stages] == [pytest.approx(0.95 * 512 - 3)]
    assert plan.idle == ()
    [one] = [way for way in plan.alternatives if way.way == "streamed"]
    assert (one.workers, run.workers) == (1, 8)
    assert 6 < (one.seconds or 0) / (run.seconds or 1) < 8


def test_a_large_card_streams_too() -> None:
    """Before: `nor does any other way`, with a terabyte of main memory next to the H100."""
    plan = shape_on(
        "Qwen3-30B-A3B",
        large={"card": "H100", "price_per_hour": 2.6, "workers": 1, "host_memory_gb": 1000},
        max_workers=1,
        host_memory_gb=16,
    )
    assert plan.alternatives[-1].name == "this run: joint training on 1 x H100, streamed from main memory"
    assert plan.alternatives[-1].limit is None
    [small] = [way.limit for way in plan.alternatives if way.way == "streamed"]
    assert small is not None
    assert small.startswith("finetune streams from 183.8 GiB per card, and its machine has room for 12.2 GiB")


def test_a_machine_of_unknown_memory_is_told_how_much_streaming_needs() -> None:
    """Before: the memory with weights in fp32 alone, twice of what the plan would take with less."""
    plan = shape_on("Qwen3-30B-A3B", recipe=None, max_workers=1)
    [limit] = [way.limit for way in plan.alternatives if way.way == "streamed"]
    assert limit == (
        "needs a machine with 391 GiB of main memory, or 197 GiB with weights in bf16; set "
        "pools.low_memory.host_memory_gb"
    )
    assert plan.verdict is not None
    assert f"joint training on 1 x RTX 4090, streamed from main memory: {limit}" in plan.verdict
    for enough in (True, False):
        told = shape_on("Qwen3-30B-A3B", max_workers=1, host_memory_gb=197 - (not enough))
        assert (told.alternatives[-1].limit is None) == enough


def test_several_cards_are_as_many_as_cost_about_the_same() -> None:
    """Before: 4 of 8 H200 for $79.23 in 7 h 41 min, where all 8 take 3 h 54 min for $79.40."""
    small = {"max_workers": 1, "price_per_hour": 9.0, "host_memory_gb": 16}
    large = {"card": "H200", "price_per_hour": 2.6, "workers": 8, "gpus_per_node": 8, "host_memory_gb": 16}
    plan = shape_on("Qwen3-30B-A3B", large=large, **small)
    run, four = plan.alternatives[-1], plan.alternatives[1]
    assert (run.name, four.name) == ("this run: joint training on 8 x H200", "joint training on 4 x H200")
    assert (four.dollars or 0) < (run.dollars or 0) < 1.02 * (four.dollars or 0)
    assert plan.verdict == (
        f"On these machines this run takes {figures(run)}: joint training on 4 x H200 costs hardly less, "
        f"{figures(four)}."
    )


@pytest.mark.parametrize(("gpus_per_node", "cards"), [(8, 8), (1, 1)])
def test_one_card_becomes_all_cards_of_its_machine_where_they_cost_the_same(gpus_per_node: int, cards: int) -> None:
    """Before: one of 8 H200 in a machine for $27.98 in 10 h 46 min, where all 8 take 1 h 22 min for $28.29."""
    small = {"max_workers": 1, "price_per_hour": 9.0, "host_memory_gb": 16}
    large = {"card": "H200", "price_per_hour": 2.6, "workers": 8, "gpus_per_node": gpus_per_node}
    plan = shape_on("OLMoE-1B-7B", large=large | {"network": 400}, **small)
    assert plan.alternatives[-1].name == f"this run: joint training on {cards} x H200"


def test_a_way_that_fits_with_rounded_weights_says_so() -> None:
    """Before: `+0.00`, next to a sentence on about 1.4 times the time until the same loss."""
    tight, roomy = (shape_on("OLMoE-1B-7B", max_workers=1, host_memory_gb=size) for size in (64, 128))
    assert [plan.alternatives[-1].rounded for plan in (tight, roomy)] == [("bf16",), ()]


@pytest.mark.parametrize(("price", "card"), [(4.5, "H200"), (6.5, "RTX 4090")])
def test_a_way_that_must_round_is_taken_where_it_saves_a_third(price: float, card: str) -> None:
    """Before: weights in bf16 for $40.25 instead of exact ones for $48.43, and no word of it in the verdict."""
    large = {"card": "H200", "price_per_hour": price, "workers": 1, "host_memory_gb": 64}
    plan = shape_on("OLMoE-1B-7B", large=large, max_workers=1, host_memory_gb=64)
    run = plan.alternatives[-1]
    assert f"joint training on 1 x {card}" in run.name
    assert bool(run.rounded) == (card == "RTX 4090")
    assert plan.verdict is not None
    assert ("The run fits with weights in bf16" in plan.verdict) == bool(run.rounded)
    if card == "H200":
        assert plan.recipe is not None
        assert plan.recipe.endswith("joint training on 1 x RTX 4090, streamed from main memory has to round")
        assert "is cheaper" not in plan.verdict


def way_at(way: str, dollars: float | None, *rounded: str, name: str = "", limit: str | None = None) -> Alternative:
    seconds, gap = None if dollars is None else 3600.0, 0.08 if way == "submodels" else 0.0
    return Alternative(
        way=way, name=name or way, workers=1, seconds=seconds, dollars=dollars, gap=gap, rounded=rounded,
        memory_gb=9.0, limit=limit,
    )  # fmt: skip


def test_a_verdict_names_no_way_that_rounds_where_a_recipe_would_not_take_it() -> None:
    """Before: a way in bf16 for $40 was called cheaper than this run for $100, next to an exact one for $48."""
    run = way_at("run", 100, name="this run")
    exact, rounding = way_at("joint_high_memory", 48), way_at("joint_low_memory", 40, "bf16")
    assert "joint_high_memory is cheaper" in str(verdict((rounding, exact, run), ""))
    # More than a third cheaper, it is taken, and what it rounds is named.
    cheap = way_at("joint_low_memory", 30, "bf16", "blocks")
    assert verdict((cheap, exact, run), "") == (
        "On these machines joint_low_memory is cheaper, because one cheap card trains the whole model, with weights in "
        "bf16 and updates in blocks: $30.00 in 1 h 00 min, against $100.00 in 1 h 00 min for this run. `recipe: auto` "
        "takes such a way."
    )
    # The run does not fit.
    none = way_at("run", None, name="this run", limit="too large")
    assert str(verdict((rounding, exact, none), "")).endswith("joint_high_memory does: $48.00 in 1 h 00 min.")
    assert str(verdict((cheap, exact, none), "")).endswith(
        "joint_low_memory does, with weights in bf16 and updates in blocks: $30.00 in 1 h 00 min."
    )


def test_a_run_that_rounds_is_not_called_cheapest_where_a_recipe_takes_an_exact_way() -> None:
    """Before: `this run costs least`."""
    rounding = way_at("run", 40, "bf16", name="this run")
    assert verdict((way_at("joint_high_memory", 48), rounding), "") == (
        "On these machines joint_high_memory rounds nothing and costs little more: $48.00 in 1 h 00 min, against "
        "$40.00 in 1 h 00 min for this run. `recipe: auto` takes such a way. The run fits with weights in bf16; what "
        "that costs in loss is not known."
    )
    assert "this run costs least" in str(verdict((way_at("joint_high_memory", 61), rounding), ""))


def test_a_trained_start_has_no_measured_gaps_but_that_of_joint_training() -> None:
    """Before: the run alone had one, next to the same training on other cards."""
    raw = yaml.safe_load(preset_text("default"))
    raw["model"] = {"init": {"checkpoint": "moe"}, "family": "qwen3_moe", "config": raw["model"]["config"]}
    raw["tokens"]["seed_share"] = 0
    ways = build_plan(RunConfig.model_validate(raw)).alternatives
    assert {way.way: way.gap for way in ways[:-1]} == {
        "joint_high_memory": 0.0, "joint_low_memory": 0.0, "members": None, "submodels": None,
    }  # fmt: skip


def test_a_verdict_names_cheaper_ways_with_a_higher_loss() -> None:
    """Before: `nothing else fits` next to rows that fit, and `costs least` next to rows that cost less."""
    raw = yaml.safe_load(on_own_cards(preset_text("default"), [LocalCard("NVIDIA GeForce RTX 4090", 24.0)], 64))
    one = build_plan(check_config(raw))
    assert all(way.limit is None and way.gap for way in one.alternatives[:-1])
    assert str(one.verdict).startswith("On these machines no other way reaches this run's loss: it takes 1 h ")
    grown = shape_on("OLMoE-1B-7B", recipe="grown", **TWO_BOXES | {"host_memory_gb": 16})
    [cheap] = [way for way in grown.alternatives if way.way == "without_submodels"]
    assert str(grown.verdict).startswith("On these machines this run costs least of the ways that reach its loss: $")
    assert "for joint training on 4 x RTX 4090, which ends at a loss that is 0.03 lower. " in str(grown.verdict)
    assert f"Training without sub-models takes {figures(cheap)}, and ends at a loss that is 0.04 higher." in str(
        grown.verdict
    )


def test_a_recipe_that_is_impossible_is_refused_in_one_line() -> None:
    tiny = {"card": None, "memory_gb": 1.5, "max_workers": 1}
    with pytest.raises(ConfigError, match=r"^recipe: 'joint': fits no pool \(joint training on 1 x "):
        decide(recipe="joint", pools=pools(low_memory=tiny, high_memory={"card": None, "memory_gb": 1.5}))


def test_a_run_keeps_the_way_that_it_began_with(tmp_path: Path) -> None:
    def asked(name: str = "kept", **low_memory: Any) -> RunConfig:
        raw = yaml.safe_load(preset_text("default")) | {"name": name, "output": str(tmp_path)}
        raw["pools"]["low_memory"] |= low_memory
        return check_config(raw)

    began = resolve(asked()).config
    create(began.directory)
    write_config(began)
    dearer = resolve(asked(price_per_hour=9.0)).config
    assert (dearer.tokens, dearer.finetune.pool) == (began.tokens, "low_memory")
    assert dearer.pools.low_memory.max_workers == 1
    assert resolve(asked("new", price_per_hour=9.0)).config.finetune.pool == "high_memory"


@pytest.mark.parametrize("asked", [{"host_memory_gb": 128}, {"memory": "streamed", "max_workers": 1}])
def test_a_run_that_streams_is_resumed_from_main_memory(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Before: with its weights on a card that does not hold them; a run that had to stream began without."""
    raw = config_on("8 spot L4", "OLMoE-1B-7B").model_dump() | {
        "recipe": "auto", "name": "streams", "output": str(tmp_path),
    }  # fmt: skip
    raw["pools"]["low_memory"] |= asked
    began = resolve(check_config(raw)).config
    assert began.pools.low_memory.memory == "streamed"
    create(began.directory)
    write_config(began)
    assert resolve(check_config(raw)).config.pools.low_memory == began.pools.low_memory
