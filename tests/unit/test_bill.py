"""What a run costs: laws of the one definition."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import (
    QUALITY_UNKNOWN,
    Bill,
    Line,
    format_dollars,
    idle_in_words,
    is_joint_training,
    make_bill,
)
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.ways import THIS_RUN, Alternative, with_ways
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
amounts = st.floats(0.01, 1e6)


def bill(of, idle=(), **changes):
    return make_bill(of, idle=idle, seconds=1.0, **{"planned": False, "complete": True} | changes)


def row(way, dollars, seconds=100.0, gap=0.0):
    return Alternative(
        way=way, name=f"the {way} way", workers=1, seconds=seconds, dollars=dollars, gap=gap, memory_gb=1.0, limit=None
    )


def compared(of, planned, other, *, gap=0.0, **changes):
    """A bill next to one other way; both amounts are planned."""
    ways = (row("joint_low_memory", other, gap=gap), row("run", planned).model_copy(update={"name": THIS_RUN}))
    return with_ways(bill(of, **changes), ways)


@given(st.lists(lines, max_size=9), idles)
def test_the_total_is_the_sum_of_the_lines_and_idle_is_never_in_it(paid, idle):
    found = bill(paid, idle)
    assert found.dollars == pytest.approx(sum(line.dollars for line in paid))
    assert found.idle_dollars == pytest.approx(sum(line.dollars for line in idle))
    assert found.dollars_with_idle == found.dollars + found.idle_dollars
    assert sorted(found.lines, key=repr) == sorted(paid, key=repr)


@given(st.lists(lines, max_size=9), lines)
def test_another_stage_never_lowers_the_cost(paid, more):
    before, after = bill(paid), bill([*paid, more])
    # Lines are added up in the pipeline's order: sums of many floats may differ in the last bits.
    assert after.dollars >= before.dollars - 1e-9 * (1 + before.dollars)


def paid(amount):
    return [Line(stage="finetune", pool="low_memory", worker_seconds=1.0, dollars=amount)]


@given(amounts, amounts, amounts)
def test_a_finished_run_saves_what_its_plan_says_of_the_cheapest_other_way(spent, planned, other):
    """A machine that is twice as slow as planned is so for all ways."""
    found = compared(paid(spent), planned, other)
    assert found.saving == pytest.approx(1 - planned / other)
    assert found.baseline.dollars == pytest.approx(spent * other / planned)
    assert found.baseline.name == "the joint_low_memory way"
    assert format_dollars(found.dollars) in found.verdict
    assert format_dollars(found.baseline.dollars) in found.verdict
    assert Bill.model_validate(json.loads(found.model_dump_json())) == found


@given(amounts, amounts, st.booleans())
def test_a_saving_is_never_without_its_baseline_and_a_verdict(planned, other, complete):
    found = compared(paid(planned), planned, other, complete=complete)
    assert (found.saving is None) == (found.verdict is None) == (found.baseline is None) == (not complete)


def test_a_run_that_costs_more_than_another_way_says_so():
    assert compared(paid(0.0864), 0.0432, 0.036).verdict == (
        "On these machines the joint_low_memory way is cheaper, because one cheap card trains the whole model: $0.0720 "
        "in 1.0 s, against $0.0864 in 1.0 s for this run. Figures of other ways are the plan's, times what this run "
        "took against its own."
    )


def test_a_way_that_ends_at_a_higher_loss_is_no_baseline():
    found = compared(paid(0.5), 0.5, 0.1, gap=0.07)
    assert (found.baseline, found.saving, found.verdict) == (None, None, None)


def test_what_a_comparison_measured_takes_the_place_of_what_is_not_known():
    measured = "A comparison measured held-out perplexity: 41.00 against 40.00."
    found = compared(paid(0.5), 0.5, 1.0, quality=measured)
    assert found.verdict.endswith(measured)
    assert QUALITY_UNKNOWN not in found.verdict


def test_a_run_whose_first_event_lists_no_ways_or_nonsense_has_a_bill_without_a_saving():
    """Events come from a driver, or from an earlier version."""
    good = [each.model_dump(mode="json") for each in (row("streamed", 0.1), row("run", 0.2))]
    for ways in (None, [], {}, 7, "x", [None], [good[0] | {"way": "no such way"}], [good[0] | {"dollars": "nan"}]):
        meter = Meter()
        meter.update(Event("run_started", data={} if ways is None else {"ways": ways}, time=1.0))
        assert meter.ways == ()
    meter.update(Event("run_started", data={"ways": good * 40}, time=1.0))
    assert len(meter.ways) == 32
    assert Meter.from_dict(json.loads(json.dumps(meter.to_dict()))) == meter


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


def test_joint_training_trains_nothing_but_the_whole_model():
    assert is_joint_training({"finetune": 5, "seed": 0})
    assert not is_joint_training({"finetune": 5, "seed": 1})


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
