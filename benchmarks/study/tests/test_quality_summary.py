import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study.quality import summary
from benchmarks.study.quality.records import CellFigures, RunFigures, Setting

JOINT = 10.0    # dollars
LOW = 0.2


def run(arm, budget, perplexity, low, high, **figures):
    """A run with these dollars on each pool, including its evaluation."""
    return RunFigures(
        arm=arm, budget=budget, perplexity=perplexity, hours=low + high / 4,
        dollars={"low_memory": (low,), "high_memory": (0.9 * high, 0.1 * high)}, **figures)


def result(seed, for_dollars, cell="small/mixtral/random", changes=({}, {}, {}, {})):
    """Figures of a cell; `changes` are made to joint training, both runs of the default, and BTX."""
    runs = (
        run("joint", "tokens", 40.0, 0.0, JOINT), run("disco", "tokens", 50.0, 1.0, 1.5),
        run("disco", "dollars", for_dollars, 4.0, 6.0), run("btx", "tokens", 60.0, 0.0, 2.0))
    setting = Setting(model={}, tokens=400_000, seed=seed, recipe="r1", low_over_high=LOW)
    return CellFigures.model_construct(cell=cell, seed=seed, setting=setting, runs=tuple(
        each.model_copy(update=change) for each, change in zip(runs, changes, strict=True)))


def entries(*results, names=summary.FIGURES, price=None):
    return {entry.arm: entry for entry in summary.summarise(results, names, price)}


def test_ratios_are_medians_of_each_seeds_own():
    seeds = [result(0, 30.0), result(1, 36.0), result(2, 20.0)]
    found = entries(*seeds)
    disco, btx = found["disco"], found["btx"].medians
    more = entries(*seeds, names=summary.MORE)["disco"].medians
    assert (disco.corpus, disco.family, disco.start, disco.seeds) == ("small", "mixtral", "random", (0, 1, 2))
    assert disco.medians["ppl_equal_tokens"] == pytest.approx(1.25)
    assert more["loss_equal_tokens"] == pytest.approx(math.log(50) / math.log(40))
    assert disco.medians["ppl_equal_dollars"] == pytest.approx(0.75)
    assert disco.spread["ppl_equal_dollars"].to_json() == {"min": pytest.approx(0.5), "max": pytest.approx(0.9)}
    assert (btx["ppl_equal_tokens"], btx["ppl_equal_dollars"], btx["dollars_to_joint_loss_ratio"]) == (1.5, None, None)


def test_an_entry_of_the_summary_has_these_keys_and_no_others():
    for entry in summary.summarise([result(0, 30.0)]):
        stored = entry.to_json()
        assert stored.keys() == {
            "corpus", "family", "start", "arm", "seeds", "ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio",
            "spread"}
        assert stored["spread"].keys() <= {"ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio"}


def test_other_text_is_compared_where_both_were_measured_on_it():
    given = result(0, 30.0, changes=({"unseen": 80.0}, {"unseen": 60.0}, {}, {}))
    found = {arm: entry.medians["unseen_equal_tokens"] for arm, entry in entries(given, names=summary.MORE).items()}
    assert found["disco"] == found["disco-low"] == pytest.approx(0.75)
    assert found["btx"] is None


def test_hours_are_compared_like_dollars():
    found = entries(result(0, 30.0), names=summary.MORE)
    disco, low = found["disco"].medians, found["disco-low"].medians
    assert disco["hours_equal_tokens"] == pytest.approx((1.0 + 1.5 / 4) / (JOINT / 4))
    assert disco["hours_equal_dollars"] == pytest.approx((4.0 + 6.0 / 4) / (JOINT / 4))
    # Its runs take 0.55 and 2.2 times joint training's hours: 1 is at log 1/0.55 over log 4 of the way between them.
    assert disco["ppl_equal_hours"] == pytest.approx(50 / 40 * (30 / 50) ** (math.log(1 / 0.55) / math.log(4)))
    assert low["hours_equal_tokens"] is low["ppl_equal_hours"] is None    # unknown from the price on the other pool


def test_prices_can_be_others():
    given = result(0, 30.0, changes=[{"metered": metered / 8} for metered in (8.0, 2.0, 7.0, 4.0)])
    names = ("dollars_to_joint_loss_ratio", "metered_to_joint_loss")

    def at(price):
        found = entries(given, names=names, price=price)
        return {arm: tuple(entry.medians[name] for name in names) for arm, entry in found.items()}

    # The default's two runs cost 2.5 and 10 dollars; with equal prices for both pools they would cost 6.5 and 26.
    part = math.log(50 / 40) / math.log(50 / 30)
    metered = pytest.approx(2 * (7 / 2) ** part / 8)
    assert at(None) == at(LOW) == {
        "disco": (pytest.approx(0.25 * 4 ** part), metered), "btx": (None, None), "joint-low": (pytest.approx(LOW), None),
        "disco-low": (pytest.approx(0.13 * (5.2 / 1.3) ** part), None)}
    assert at(1.0)["disco"] == (pytest.approx(0.65 * 4 ** part), metered)
    assert at(1.0)["joint-low"] == (1.0, None)
    assert at(1.0)["disco-low"][0] == pytest.approx(at(1.0)["disco"][0])


def test_equal_dollars_are_joint_trainings_to_the_last_one():
    # A run at equal training dollars costs an eighth more in total: 2.5 and 11.25 dollars; joint training costs 10.
    more, less = ({"dollars": {"low_memory": (low,), "high_memory": (6.0,)}} for low in (5.25, 3.0))
    part = math.log(10 / 2.5) / math.log(11.25 / 2.5)
    found = entries(result(0, 30.0, changes=({}, {}, more, {})))["disco"].medians
    assert found["ppl_equal_dollars"] == pytest.approx(50 / 40 * (30 / 50) ** part)
    # Two runs for less than joint training's dollars do not show what its dollars buy.
    assert entries(result(0, 30.0, changes=({}, {}, less, {})))["disco"].medians["ppl_equal_dollars"] is None


RUNS = st.lists(st.tuples(st.floats(0.1, 100), st.floats(2, 100)), min_size=1, max_size=5, unique_by=lambda run: run[0])


@given(RUNS, st.floats(0.1, 100))
def test_what_dollars_buy_is_between_the_runs_that_cost_less_and_more(runs, dollars):
    found = summary.at_budget(dollars, runs)
    less = max((run for run in runs if run[0] <= dollars), default=None)
    more = min((run for run in runs if run[0] >= dollars), default=None)
    if less is not None and more is not None:
        low, high = sorted((less[1], more[1]))
        assert low * (1 - 1e-9) <= found <= high * (1 + 1e-9)
    elif found is not None:
        assert any(found == reached and abs(math.log(spent / dollars)) < 1.1e-3 for spent, reached in runs)


@given(RUNS)
def test_what_a_runs_own_dollars_buy_is_what_it_reached(runs):
    for spent, reached in runs:
        assert summary.at_budget(spent, runs) == pytest.approx(reached, rel=1e-6)


def test_dollars_to_a_loss_are_between_two_complete_runs():
    # Of the way from 50 to 25 on a log scale, 40 is a third and a bit; the dollars go from 2.5 to 10 meanwhile.
    part = math.log(50 / 40) / math.log(50 / 25)
    assert entries(result(0, 25.0))["disco"].medians["dollars_to_joint_loss_ratio"] == pytest.approx(2.5 * 4 ** part / JOINT)


def test_the_same_training_is_priced_on_the_cheap_pool():
    found = entries(result(0, 25.0))
    joint, disco = found["joint-low"].medians, found["disco-low"].medians
    assert (joint["ppl_equal_tokens"], joint["ppl_equal_dollars"], joint["dollars_to_joint_loss_ratio"]) == (1.0, None, LOW)
    assert disco["ppl_equal_tokens"] == pytest.approx(1.25)
    assert disco["ppl_equal_dollars"] is None
    part = math.log(50 / 40) / math.log(50 / 25)
    assert disco["dollars_to_joint_loss_ratio"] == pytest.approx(1.3 * (5.2 / 1.3) ** part / JOINT)


def test_a_seed_that_never_came_down_is_not_passed_over():
    disco = entries(result(0, 30.0), result(1, 41.0))["disco"]
    assert disco.medians["dollars_to_joint_loss_ratio"] is None
    assert "dollars_to_joint_loss_ratio" not in disco.spread


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(2, 100)), max_size=6), st.floats(2, 100))
def test_a_perplexity_costs_no_more_and_no_less_than_the_runs(runs, perplexity):
    found = summary.dollars_to(perplexity, runs)
    good = [dollars for dollars, reached in runs if reached <= perplexity]
    assert (found is None) == (not good)
    if found is not None:
        assert min(dollars for dollars, _ in runs) * (1 - 1e-9) <= found <= min(good) * (1 + 1e-9)
