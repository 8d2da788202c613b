"""What a run costs: laws of the one definition."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import (
    QUALITY_UNKNOWN,
    Baseline,
    Bill,
    Line,
    format_dollars,
    idle_in_words,
    is_joint_training,
    make_baseline,
    make_bill,
    metered_bill,
)
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stages import STAGES

LOW, HIGH = 0.36, 3.6  # dollars per hour
NAMES = [stage.name for stage in STAGES]
CONFIG = RunConfig.model_validate(
    {
        "name": "tiny",
        "corpus": {"sources": [{"path": "embedded"}]},
        "clusters": {"count": 2},
        "pools": {"low_memory": {"price_per_hour": LOW}, "high_memory": {"price_per_hour": HIGH, "speed": 1.0}},
    }
)

dollars = st.floats(0, 1e6).map(lambda value: round(value, 4))
lines = st.builds(
    Line,
    stage=st.sampled_from(NAMES),
    pool=st.sampled_from(["low_memory", "high_memory"]),
    worker_seconds=st.floats(0, 1e6),
    dollars=dollars,
)
idles = st.lists(
    st.builds(Line, stage=st.just("idle"), pool=st.just("low_memory"), worker_seconds=st.just(1.0), dollars=dollars),
    max_size=3,
)
baselines = st.floats(0.01, 1e6).map(
    lambda amount: Baseline(
        lines=(Line(stage="finetune", pool="high_memory", worker_seconds=1.0, dollars=amount),),
        dollars=amount,
        seconds=1.0,
        rate="measured",
    )
)


def bill(of, idle=(), baseline=None, **changes):
    return make_bill(of, idle=idle, seconds=1.0, baseline=baseline, **{"planned": False, "complete": True} | changes)


@given(st.lists(lines, max_size=9), idles, baselines)
def test_the_total_is_the_sum_of_the_lines_and_idle_is_never_in_it(paid, idle, baseline):
    found = bill(paid, idle, baseline)
    assert found.dollars == pytest.approx(sum(line.dollars for line in paid))
    assert found.idle_dollars == pytest.approx(sum(line.dollars for line in idle))
    assert found.dollars_with_idle == found.dollars + found.idle_dollars
    without = bill(paid, (), baseline)
    assert (found.dollars, found.saving, found.verdict) == (without.dollars, without.saving, without.verdict)
    assert sorted(found.lines, key=repr) == sorted(paid, key=repr)


@given(st.lists(lines, max_size=9), lines, baselines)
def test_another_stage_never_lowers_the_cost_nor_raises_the_saving(paid, more, baseline):
    before, after = bill(paid, baseline=baseline), bill([*paid, more], baseline=baseline)
    # Lines are added up in the pipeline's order: sums of many floats may differ in the last bits.
    slack = 1e-9 * (1 + before.dollars)
    assert after.dollars >= before.dollars - slack
    assert after.saving <= before.saving + slack / baseline.dollars


@given(st.lists(lines, max_size=9), baselines, baselines)
def test_a_more_expensive_baseline_never_lowers_the_saving(paid, one, other):
    low, high = sorted((one, other), key=lambda baseline: baseline.dollars)
    assert bill(paid, baseline=low).saving <= bill(paid, baseline=high).saving


@given(st.lists(lines, max_size=9), idles, baselines, st.booleans(), st.booleans())
def test_a_saving_is_never_without_its_baseline_and_what_is_known_of_quality(paid, idle, baseline, planned, complete):
    found = bill(paid, idle, baseline, planned=planned, complete=complete)
    assert (found.saving is None) == (found.verdict is None) == (not complete)
    if found.verdict is not None:
        assert "estimate" in found.verdict
        assert format_dollars(baseline.dollars) in found.verdict
        assert found.verdict.endswith(QUALITY_UNKNOWN)
        assert ("cheaper" in found.verdict) == (found.saving >= 0)
        assert ("Costs " in found.verdict) == (found.saving < 0)
    assert Bill.model_validate(json.loads(found.model_dump_json())) == found


def test_a_run_that_costs_more_than_joint_training_says_so():
    baseline = make_baseline(CONFIG, tokens=1000, seconds_per_token=0.036, start_up=0, evaluate=0, export=0)
    assert baseline.dollars == pytest.approx(0.036)
    verdict = bill(
        [Line(stage="finetune", pool="high_memory", worker_seconds=1.0, dollars=0.0432)], baseline=baseline
    ).verdict
    assert verdict.startswith(
        "Costs 20 % more than joint training on as many tokens on the high-memory pool, $0.0360, an estimate"
    )


def test_what_a_comparison_measured_takes_the_place_of_what_is_not_known():
    measured = "A comparison measured held-out perplexity: 41.00 against 40.00."
    found = bill(
        [],
        baseline=make_baseline(CONFIG, tokens=1, seconds_per_token=1, start_up=0, evaluate=0, export=0),
        quality=measured,
    )
    assert found.verdict.endswith(measured)
    assert QUALITY_UNKNOWN not in found.verdict


def test_an_unknown_line_makes_an_unknown_total_not_a_smaller_one():
    found = bill([Line(stage="seed", pool="low_memory", worker_seconds=None, dollars=None)], planned=True)
    assert (found.dollars, found.dollars_with_idle, found.saving, idle_in_words(found)) == (None, None, None, "unknown")


spans = st.lists(
    st.tuples(
        st.sampled_from(["seed", "cluster", "submodels", "merge", "finetune", "evaluate", "export"]),
        st.sampled_from(["low_memory", "high_memory"]),
        st.integers(1, 8),
        st.integers(0, 500),
    ),
    max_size=8,
)


@given(spans, st.integers(0, 8))
def test_a_metered_bill_has_every_second_that_a_stage_held_a_slot_also_of_lost_attempts(held, lost):
    """A driver dies after some stages; the next one's clock starts later, and what the first held stays on the bill."""
    meter, now, expected = Meter(), 1000.0, 0.0
    meter.update(Event("run_started", time=now))
    for number, (stage, pool, workers, seconds) in enumerate(held):
        if number == lost:
            now += 5000
            meter.update(Event("run_started", time=now))
        meter.update(Event("stage_started", stage, time=now))
        meter.update(Event("workers_held", data={"hold": str(number), "pool": pool, "workers": workers}, time=now))
        now += seconds
        if number + 1 == lost:
            meter.update(Event("heartbeat", time=now))  # its last sign of life
        else:
            meter.update(Event("workers_released", data={"hold": str(number)}, time=now))
        expected += workers * seconds / 3600 * (LOW if pool == "low_memory" else HIGH)
    meter.update(Event("run_finished", time=now))
    found = metered_bill(Meter.from_dict(json.loads(json.dumps(meter.to_dict()))), CONFIG)
    assert found.dollars == pytest.approx(expected)
    assert {(line.stage, line.pool) for line in found.lines} == {(stage, pool) for stage, pool, _, _ in held}
    assert found.seconds == pytest.approx(sum(seconds for _, _, _, seconds in held))
    assert found.complete


def test_figures_that_make_no_sense_change_no_bill():
    meter = Meter()
    units = [{"tokens": "x", "seconds": float("nan"), "workers": -1}, {"tokens": 10**400, "seconds": True}, None, 7]
    for summary in ({"units": units, "extra_seconds": "1"}, {"units": 3}, [], None):
        meter.update(Event("stage_finished", "finetune", data={"summary": summary}, time=1.0))
        assert dataclasses.asdict(meter.work["finetune"]) == {
            "tokens": 0,
            "loop_seconds": 0,
            "held_seconds": 0,
            "extra_seconds": 0,
        }
    meter.update(Event("stage_started", "no such stage", time=2.0))
    assert "no such stage" not in meter.before
    assert metered_bill(meter, CONFIG).baseline is None


def test_joint_training_itself_saves_nothing():
    assert is_joint_training({"finetune": 5, "seed": 0})
    assert not is_joint_training({"finetune": 5, "seed": 1})


def test_the_measured_baseline_starts_the_high_memory_pool_s_workers_not_the_fine_tune_s():
    """Eight low-memory workers wait a minute to begin; joint training would start one."""
    config = RunConfig.model_validate(CONFIG.model_dump() | {"finetune": {"pool": "low_memory"}})
    baseline = metered_bill(metered_finetune(), config).baseline
    scale = config.pools.low_memory.speed
    assert {line.stage: line.worker_seconds for line in baseline.lines} == pytest.approx(
        {"start-up": 60, "finetune": 1000 * scale, "evaluate": 0, "export": 0}
    )
    assert baseline.seconds == pytest.approx(60 + 1000 * scale)


def test_the_measured_baseline_measures_the_held_out_loss_as_often_as_the_run():
    """Reading 3,000 tokens takes the time of training 1,000, after each 2,000 that are trained."""
    evaluation = {"every_tokens": 2000, "max_tokens": 3000}
    config = RunConfig.model_validate(
        CONFIG.model_dump() | {"finetune": {"pool": "low_memory"}, "evaluation": evaluation}
    )
    seconds = {line.stage: line.worker_seconds for line in metered_bill(metered_finetune(), config).baseline.lines}
    assert seconds["finetune"] == pytest.approx(1.5 * 1000 * config.pools.low_memory.speed)


def test_joint_training_on_the_cheap_pool_saves_nothing_either():
    """Before: a run on the cheap pool was called cheaper than joint training, though it was joint training itself."""
    config = RunConfig.model_validate(CONFIG.model_dump() | {"finetune": {"pool": "low_memory"}})
    bill = metered_bill(metered_finetune(seed_tokens=0), config)
    assert bill.complete
    assert (bill.baseline, bill.saving, bill.verdict) == (None, None, None)


def metered_finetune(seed_tokens=200):
    meter = Meter()
    unit = {"tokens": 800, "seconds": 100.0, "workers": 8}
    for event in (
        Event("run_started", time=0.0),
        Event("stage_finished", "seed", data={"summary": {"units": [unit | {"tokens": seed_tokens}]}}, time=0.0),
        Event("stage_started", "finetune", time=0.0),
        Event("workers_held", data={"hold": "gang", "pool": "low_memory", "workers": 8}, time=0.0),
        Event("unit_started", "finetune", time=60.0),
        Event("workers_released", data={"hold": "gang"}, time=160.0),
        Event("stage_finished", "finetune", data={"summary": {"units": [unit]}}, time=160.0),
        Event("run_finished", time=160.0),
    ):
        meter.update(event)
    return meter


@given(st.integers(1, 16), st.integers(1, 16), st.floats(0, 1e3))
def test_the_baseline_s_start_up_depends_on_the_high_memory_pool_alone(low, high, starting):
    pools = {"low_memory": {"max_workers": low}, "high_memory": {"workers": high, "price_per_hour": HIGH}}
    config = RunConfig.model_validate(CONFIG.model_dump() | {"finetune": {"pool": "low_memory"}, "pools": pools})
    found = make_baseline(config, tokens=1, seconds_per_token=0, start_up=starting, evaluate=0, export=0)
    assert found.dollars == pytest.approx(starting * high / 3600 * HIGH)
    assert found.seconds == pytest.approx(starting)


def test_time_is_multiplied_by_a_price_in_one_place():
    """A second place would show another cost as soon as prices change."""
    root = Path(__file__).parents[2]
    texts = {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for folder in ("moedisco_ray", "service")
        for path in (root / folder).rglob("*.py")
    }
    found = {
        name
        for name, text in texts.items()
        if "price_per_hour" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and "price_per_hour" in ast.unparse(node)
    }
    assert found == {"moedisco_ray/core/records/prices.py"}
