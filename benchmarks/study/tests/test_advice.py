from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_example import LAWS, MODEL, Law, base_config, comparison, only

from benchmarks.study.advice import advise
from benchmarks.study.advice.advised import Advice, Goal
from benchmarks.study.advice.fitting import fit_recipes
from benchmarks.study.advice.measured import Measurements, comparison_runs
from benchmarks.study.compare.accounting import Reads
from benchmarks.study.compare.arms import ARMS, Arm, planned
from benchmarks.study.compare.records import Comparison
from moedisco_ray.core.config import RunConfig, check_config, put
from moedisco_ray.core.errors import ConfigError, RunDirError
from moedisco_ray.plan import build_plan

BASE = base_config()
JOINT = planned(BASE, ARMS["joint"]).training_dollars
"""Dollars of the smallest measured joint training."""


def measured(*tables: Comparison) -> Measurements:
    return Measurements(tuple(run for table in tables for run in comparison_runs(table)))


def budget(dollars: float) -> Goal:
    return Goal(kind="budget_dollars", value=dollars)


def target(loss: float) -> Goal:
    return Goal(kind="target_loss", value=loss)


def advised_config(config: RunConfig, advice: Advice) -> RunConfig:
    raw = config.model_dump(mode="json")
    for path, change in advice.settings.items():
        put(raw, path, change.advised)
    return check_config(raw)


def line(level: float, slope: float, unit: float = 4e7) -> Law:
    """A loss that a straight line through two sizes predicts exactly."""
    return lambda tokens: level - slope * math.log(tokens / unit)


THREE_SEEDS = measured(*(comparison(BASE, seed=seed, noise=0.01) for seed in range(3)))
LINES = measured(comparison(BASE, {"joint": line(3.0, 0.2), "disco": line(3.1, 0.2), "upcycle": line(3.0, 0.1)}, times=(1, 4)))


def test_the_cheapest_loss_of_exact_lines() -> None:
    advice = advise(BASE, LINES, budget(JOINT * 3))
    # The base configuration already has disco's settings, so only the tokens change.
    assert list(advice.settings) == ["tokens.total"]
    rate = build_plan(BASE).training_dollars / BASE.tokens.total
    assert advice.advised.title == "MoE-DisCo, as configured"
    assert advice.advised.tokens == pytest.approx(JOINT * 3 / rate, rel=1e-3)
    assert advice.advised.loss == pytest.approx(line(3.1, 0.2)(JOINT * 3 / rate))
    assert build_plan(advised_config(BASE, advice)).training_dollars == pytest.approx(JOINT * 3, rel=2e-3)


def test_the_least_dollars_to_a_loss_of_exact_lines() -> None:
    advice = advise(BASE, LINES, target(2.8))
    tokens = 4e7 * math.exp((3.1 - 2.8) / 0.2)
    assert advice.sought == "dollars"
    assert advice.advised.tokens == pytest.approx(tokens, rel=1e-3)
    assert advice.advised.dollars == pytest.approx(tokens * build_plan(BASE).training_dollars / BASE.tokens.total, rel=1e-3)
    assert advice.advised.extrapolation == 1


def test_what_changes_is_the_recipe_that_was_measured() -> None:
    config = base_config(
        tokens={"total": 10_000_000, "seed_share": 0.1}, clusters={"count": 2, "vectors": "mean_token"},
        submodels={"optimizer": {"batch_tokens": 32_768}, "sync_every": 7})
    advice = advise(config, THREE_SEEDS, budget(JOINT))
    assert {path: change.advised for path, change in advice.settings.items() if path != "tokens.total"} == {
        "tokens.seed_share": 0.3, "clusters.count": 4, "clusters.vectors": "hidden_state", "submodels.sync_every": None,
        "submodels.optimizer.batch_tokens": 16_384}
    assert build_plan(advised_config(config, advice)).training_dollars == pytest.approx(JOINT, rel=2e-3)


def test_confidence_follows_from_what_there_is() -> None:
    inside, beyond, far = (advise(BASE, THREE_SEEDS, budget(JOINT * times)).confidence for times in (0.7, 3, 40))
    assert (inside.level, beyond.level, far.level) == ("high", "medium", "low")
    assert inside.grounds[0].words == "interpolates between 6 runs of this recipe"
    assert far.grounds[0].words == "extrapolates 40.0x beyond the measured runs of this recipe"
    one = advise(BASE, measured(comparison(BASE)), budget(JOINT * 0.7))
    assert one.confidence.grounds[0].words == "one run of each: what chance does is not known"
    assert (one.confidence.level, one.advised.interval) == ("low", None)


def test_close_recipes_are_not_surely_ranked() -> None:
    laws = {"joint": LAWS["joint"], "disco": LAWS["disco"], "paper": lambda tokens: LAWS["disco"](tokens) + 0.0005}
    advice = advise(BASE, measured(*(comparison(BASE, laws, seed, noise=0.05) for seed in range(3))), budget(JOINT * 0.7))
    assert 0.2 < (advice.advised.best_in or 0) < 0.9
    assert advice.confidence.level != "high"


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(3)), st.sampled_from(["budget", "target"]))
def test_the_order_of_what_is_read_changes_nothing(order: list[int], kind: str) -> None:
    tables = [comparison(BASE, seed=seed, noise=0.01) for seed in range(3)]
    goal = budget(JOINT) if kind == "budget" else target(2.9)
    expected = advise(BASE, measured(*tables), goal)
    shuffled = measured(*(
        tables[i].model_copy(update={"rows": (tables[i].rows[0], *reversed(tables[i].rows[1:]))}) for i in order))
    assert advise(BASE, shuffled, goal) == expected


@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(0.4, 60), min_size=2, max_size=4), st.integers(0, 3))
def test_more_budget_never_has_more_loss_nor_less_loss_fewer_dollars(times: list[float], seed: int) -> None:
    runs = measured(comparison(BASE, seed=seed, noise=0.1))
    advice = [advise(BASE, runs, budget(JOINT * each)).advised for each in sorted(times)]
    assert all(right.loss <= left.loss + 1e-9 for left, right in itertools.pairwise(advice))
    dollars = [advise(BASE, runs, target(each.loss)).advised.dollars for each in advice if each.extrapolation < 50]
    assert all(left <= right * (1 + 1e-9) for left, right in itertools.pairwise(dollars))


@settings(max_examples=12, deadline=None)
@given(st.floats(0.05, 0.5), st.floats(0.5, 90))
def test_what_is_dominated_is_never_advised(slope: float, times: float) -> None:
    # The paper's curve falls twice as fast and would cross disco's, but disco is better at every measured size.
    laws = {"joint": line(6.0, slope), "disco": line(3.0, slope), "paper": line(3.0 + 3 * slope, 2 * slope)}
    advice = advise(BASE, measured(comparison(BASE, laws)), budget(JOINT * times))
    assert advice.advised.title == "MoE-DisCo, as configured"
    assert all(row.dominated for row in advice.options[1:])


def test_prices_are_the_configurations_own() -> None:
    costly = base_config(pools={
        "low_memory": {**BASE.pools.low_memory.model_dump(), "price_per_hour": BASE.pools.high_memory.price_per_hour}})
    # If a token costs the same on both pools, the recipe that needs the fewest tokens is the cheapest.
    advice = advise(costly, LINES, target(2.8))
    assert advice.advised.title == "joint, high-memory pool"
    assert advice.settings["tokens.finetune_share"].advised == 1


def test_a_gang_trains_where_it_was_measured_or_where_the_configuration_has_it() -> None:
    laws = {"joint": line(3.0, 0.2), "joint-low": line(3.0, 0.2), "disco": line(3.1, 0.2)}
    runs = measured(comparison(BASE, laws))
    assert {row.title for row in advise(BASE, runs, budget(JOINT)).options} == {
        "joint, high-memory pool", "joint, low-memory pool", "MoE-DisCo, as configured"}
    assert len({row.runs for row in advise(BASE, runs, budget(JOINT)).options if row.title.startswith("joint")}) == 1
    config = base_config(finetune={"pool": "low_memory"})
    moved = {row.title: row for row in advise(config, runs, budget(JOINT)).options}
    assert moved.keys() == {
        "joint, high-memory pool", "joint, low-memory pool", "MoE-DisCo, as configured",
        "MoE-DisCo, as configured, moved to low-memory"}
    assert moved["MoE-DisCo, as configured, moved to low-memory"].tokens > moved["MoE-DisCo, as configured"].tokens


def test_intervals_hold_the_truth_mostly() -> None:
    truth = line(3.1, 0.2)
    held = 0
    for trial in range(40):
        tables = [comparison(BASE, {"joint": line(3.0, 0.2), "disco": truth}, 3 * trial + i, noise=0.03) for i in range(3)]
        found = fit_recipes(measured(*tables).runs)
        at = next(i for i, recipe in enumerate(found.recipes) if not recipe.reference)
        drawn = sorted(draw.curves[at].loss(2e8) for draw in found.draws())
        held += drawn[20] <= truth(2e8) <= drawn[-21]
    assert 32 <= held <= 40


def test_rounds_are_one_recipe_when_their_steps_or_their_number_stays() -> None:
    def tables(every: list[int]) -> list[Comparison]:
        return [
            comparison(
                base_config(tokens={"total": total, "seed_share": 0.3}, submodels={"sync_every": each}),
                {"joint": LAWS["joint"], "disco": LAWS["disco"]})
            for total, each in zip((40_000_000, 80_000_000), every, strict=True)]

    config = base_config(tokens={"total": 60_000_000, "seed_share": 0.3})
    fixed = fit_recipes(measured(*tables([50, 50])).runs)
    assert [(recipe.sync_every, len(recipe.sizes())) for recipe in fixed.recipes if not recipe.reference] == [(50, 4)]
    assert advise(config, measured(*tables([50, 50])), budget(JOINT)).settings["submodels.sync_every"].advised == 50

    # 335 and 671 steps of a sub-model: 12 rounds of 28, or of 56. At equal dollars there would be more rounds: another recipe.
    rows = [only(table, lambda row: row.budget == "tokens") for table in tables([28, 56])]
    kept = fit_recipes(measured(*rows).runs)
    assert [(recipe.rounds, len(recipe.sizes())) for recipe in kept.recipes if not recipe.reference] == [(12, 2)]
    advice = advise(config, measured(*rows), budget(JOINT / 2))
    steps = next(stage.steps for stage in build_plan(advised_config(config, advice)).stages if stage.stage == "submodels")
    assert -(-steps // advice.settings["submodels.sync_every"].advised) == 12


LARGE = base_config(model={"config": {**MODEL, "hidden_size": 256, "moe_intermediate_size": 512}})


def test_another_model_takes_over_the_ratio_to_joint_training() -> None:
    laws = {"joint": line(3.0, 0.2), "disco": line(3.0 + 0.2 * math.log(2), 0.2)}    # twice the tokens for any loss
    advice = advise(LARGE, measured(comparison(BASE, laws, times=(1, 4))), budget(1.0))
    rates = [planned(LARGE, ARMS[name]).training_dollars for name in ("disco", "joint")]
    assert advice.advised.ratio == pytest.approx(2 * rates[0] / rates[1])
    assert advice.advised.loss is None
    assert advice.sought == "ratio"
    assert advice.confidence.level == "low"
    assert build_plan(advised_config(LARGE, advice)).training_dollars == pytest.approx(1.0, rel=2e-3)


def test_another_model_keeps_its_own_learning_rates_and_batches() -> None:
    config = LARGE.model_copy(update={"clusters": LARGE.clusters.model_copy(update={"count": 2})})
    small = base_config(submodels={"optimizer": {"lr": 9e-3, "batch_tokens": 8192}, "sync_every": 40})
    advice = advise(config, measured(*(comparison(small, seed=seed, noise=0.01) for seed in range(2))), budget(1.0))
    assert list(advice.settings) == ["tokens.total", "clusters.count", "submodels.sync_every"]
    low, high = advice.advised.interval or (math.inf, None)
    assert low < (advice.advised.ratio or 0) < (high or 0)


def test_reading_outside_training_counts_when_recipes_are_compared() -> None:
    def reads(config: RunConfig, arm: Arm) -> Reads:
        return {"cluster": {"submodel": 4e7}} if config.tokens.decoupled else {}

    laws = {"joint": line(3.0, 0.2), "disco": line(3.5, 0.2)}
    compared = ("joint", "tokens"), ("disco", "dollars")
    table = only(comparison(BASE, laws, times=(1, 4), reads=reads), lambda row: (row.arm, row.budget) in compared)
    assert len({round(row.dollars / JOINT, 3) for row in table.rows}) == 2
    # Clustering leaves the default fewer dollars for training than joint training has.
    advice = advise(BASE, measured(table), budget(JOINT * 2))
    assert [(row.title, row.dominated) for row in advice.options] == [
        ("joint, high-memory pool", False), ("MoE-DisCo, as configured", True)]


@pytest.mark.parametrize("section", ["submodels", "finetune"])
def test_recipes_that_differ_in_moments_alone_stay_apart(section: str) -> None:
    fresh = base_config(**{section: {"keep_optimizer_state": False}})
    laws = {"joint": LAWS["joint"], "disco": lambda tokens: LAWS["disco"](tokens) + 0.1}
    for config in (BASE, LARGE):    # the measured model, and a model of another size
        options = advise(config, measured(comparison(BASE), comparison(fresh, laws)), budget(JOINT)).options
        assert {row.title for row in options} >= {
            "MoE-DisCo, as configured (keep_optimizer_state True)", "MoE-DisCo, as configured (keep_optimizer_state False)"}


def test_several_other_models_are_surer_than_one() -> None:
    texts = [base_config(corpus={"sources": [{"path": "embedded", "name": name}]}) for name in ("a", "b")]
    tables = [comparison(text, seed=seed, noise=0.01) for text in texts for seed in range(3)]
    near = base_config(corpus={"sources": [{"path": "embedded", "name": "c"}]})
    assert advise(near, measured(*tables), budget(JOINT)).confidence.level == "medium"
    assert advise(near, measured(*tables[:3]), budget(JOINT)).confidence.level == "low"


def needing(times: float, slope: float = 0.2) -> Law:
    """A law that needs `times` joint training's tokens for any loss; with another slope, only for the middle measured loss."""
    return line(3.0 + slope * math.log(2 * times) - 0.2 * math.log(2), slope)


def on_text(name: str, pool: str = "high_memory", **laws: Law) -> Comparison:
    text = base_config(corpus={"sources": [{"path": "embedded", "name": name}]}, finetune={"pool": pool})
    return comparison(text, {"joint": line(3.0, 0.2), **laws}, times=(1, 4))


def rate(arm: str) -> float:
    """Dollars per token of an arm on the large model, relative to joint training."""
    return planned(LARGE, ARMS[arm]).training_dollars / planned(LARGE, ARMS["joint"]).training_dollars


@pytest.mark.parametrize(("easier", "more"), [(1.2, 1.05), (3.0, 1.5)])
def test_a_recipe_is_no_better_for_having_been_measured_where_all_are(easier: float, more: float) -> None:
    upcycle = needing(more * rate("disco") / rate("upcycle"), slope=0.1)    # better where small, so that it is not dominated
    runs = measured(
        on_text("hard", disco=needing(easier), paper=needing(2 * easier)),
        on_text("easy", disco=needing(1), paper=needing(2), upcycle=upcycle))
    advice = advise(LARGE, runs, budget(1.0))
    row = next(row for row in advice.options if row.title == "sparse upcycling")
    assert advice.advised.title == "MoE-DisCo, as configured"
    assert row.ratio == pytest.approx(more * (advice.advised.ratio or 0))
    assert (row.dominated, row.best_in) == (False, 0)
    assert ("low", "measured with sparse upcycling in 1 of 2 other models or texts") in advice.confidence.grounds


def test_recipes_that_were_measured_everywhere_have_their_mean_ratio() -> None:
    needed = {"a": (2, 1), "b": (1.5, 3), "c": (1, 2)}
    runs = measured(*(on_text(name, disco=needing(disco), paper=needing(paper)) for name, (disco, paper) in needed.items()))
    advice = advise(LARGE, runs, budget(1.0))
    ratios = {row.title: row.ratio for row in advice.options}
    assert ratios["MoE-DisCo, as configured"] == pytest.approx(3 ** (1 / 3) * rate("disco"))
    assert ratios["MoE-DisCo, as the paper"] == pytest.approx(6 ** (1 / 3) * rate("paper"))
    assert ratios["joint, high-memory pool"] == 1
    assert ("high", "measured wherever the other recipes were") in advice.confidence.grounds


def test_recipes_that_share_nothing_are_compared_with_joint_training() -> None:
    runs = measured(on_text("a", disco=needing(1.5)), on_text("b", upcycle=needing(3)))
    advice = advise(LARGE, runs, budget(1.0))
    ratios = {row.title: row.ratio for row in advice.options}
    assert ratios["MoE-DisCo, as configured"] == pytest.approx(1.5 * rate("disco"))
    assert ratios["sparse upcycling"] == pytest.approx(3 * rate("upcycle"))
    assert (
        "low", "never measured with sparse upcycling: compared through other recipes, or through joint training alone",
    ) in advice.confidence.grounds


def test_where_a_gang_trained_changes_what_its_tokens_cost_alone() -> None:
    runs = measured(
        on_text("a", disco=needing(2), paper=needing(6)), on_text("b", "low_memory", disco=needing(1.5), paper=needing(3)))
    rows = {row.title: row for row in advise(LARGE, runs, budget(1.0)).options}
    for recipe in ("MoE-DisCo, as configured", "MoE-DisCo, as the paper"):
        low, high = (rows[f"{recipe} (pool {pool})"] for pool in ("low_memory", "high_memory"))
        assert low.runs < high.runs
        assert (low.ratio or 0) * low.tokens == pytest.approx((high.ratio or 0) * high.tokens, rel=1e-3)


def test_runs_of_the_same_model_go_before_those_of_others() -> None:
    both = measured(comparison(BASE), comparison(LARGE))
    advice = advise(BASE, both, budget(JOINT))
    assert advice.sought == "loss"
    assert advice.notes == (f"{len(comparison(LARGE).rows)} runs of other models or texts",)


@pytest.mark.parametrize(("config", "goal", "line"), [
    (BASE, budget(0), "--budget-dollars: 0.0: must be a number above 0"),
    (BASE, target(math.nan), "--target-loss: nan: must be a number above 0"),
    (BASE, budget(1e-7), "--budget-dollars: 1e-07: is less than the smallest measured run costs here, 0.00"),
    (BASE, budget(1e4), "--budget-dollars: 10000.0: is more than 100 times what the largest measured run costs here, 0.00"),
    (BASE, target(1.0), "--target-loss: 1.0: no recipe comes down to it within 100 times its largest measured run, the best to"),
    (LARGE, target(3.0), "--target-loss: 3.0: these runs are of other models or texts (active_parameters, parameters differ)"),
    (base_config(model={"family": "mixtral", "config": MODEL}), budget(1), "model.family: 'mixtral': these runs are of qwen3_moe"),
    (base_config(pools={"high_memory": {"memory_gb": 0.1}, "low_memory": {"memory_gb": 0.1}}), budget(1),
     "--from: no measured recipe can be carried out here (MoE-DisCo, as configured: seed does not fit low_memory: "),
    (base_config(pools={"high_memory": {"price_per_hour": 0}, "low_memory": {"price_per_hour": 0}}), budget(1),
     "pools: training costs nothing, so there is nothing to weigh; give the pools prices"),
])
def test_what_cannot_be_answered_is_one_line(config: RunConfig, goal: Goal, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        advise(config, THREE_SEEDS, goal)
    assert str(caught.value).startswith(line)


def test_runs_of_one_size_do_not_show_how_a_loss_falls() -> None:
    table = only(comparison(BASE), lambda row: row.budget == "tokens")
    with pytest.raises(RunDirError, match="every recipe was measured at one number of tokens only"):
        advise(BASE, measured(table), budget(JOINT))
    with pytest.raises(RunDirError, match="runs of another model: every recipe was measured at one"):
        advise(LARGE, measured(table), budget(JOINT))


def test_another_model_without_joint_training_is_an_error() -> None:
    runs = tuple(run for run in THREE_SEEDS.runs if not run.reference)
    with pytest.raises(RunDirError, match=r"no joint training among them; `python -m benchmarks.study compare` makes"):
        advise(LARGE, Measurements(runs), budget(JOINT))


def test_a_recipe_that_the_configuration_refuses_is_set_aside() -> None:
    config = base_config(evaluation={"ensemble": True})
    advice = advise(config, THREE_SEEDS, budget(JOINT))
    assert [row.title for row in advice.options] == ["MoE-DisCo, as configured", "MoE-DisCo, as the paper"]
    assert [note.partition(":")[0] for note in advice.notes] == ["joint, high-memory pool"]


def test_an_advice_is_json() -> None:
    advice = advise(BASE, THREE_SEEDS, target(2.6))
    assert Advice.model_validate(json.loads(advice.model_dump_json())) == advice
