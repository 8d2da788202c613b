import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study.quality import summary

JOINT = 10.0    # dollars
LOW = 0.2


def row(arm, budget, perplexity, low, high):
    """A run with these dollars on each pool, including its evaluation."""
    return {"arm": arm, "budget": budget, "perplexity": perplexity, "dollars": low + high, "hours": low + high / 4, "phases": [
        {"stage": "submodels", "pool": "low_memory", "dollars": low},
        {"stage": "finetune", "pool": "high_memory", "dollars": 0.9 * high},
        {"stage": "evaluate", "pool": "high_memory", "dollars": 0.1 * high}]}


def result(seed, for_dollars, cell="small/mixtral/random"):
    return {"cell": cell, "seed": seed, "setting": {"low_over_high": LOW}, "rows": [
        row("joint", "tokens", 40.0, 0.0, JOINT), row("disco", "tokens", 50.0, 1.0, 1.5),
        row("disco", "dollars", for_dollars, 4.0, 6.0), row("btx", "tokens", 60.0, 0.0, 2.0)]}


def entries(*results):
    return {entry["arm"]: entry for entry in summary.summarise(results)}


def test_ratios_are_medians_of_each_seeds_own():
    seeds = [result(0, 30.0), result(1, 36.0), result(2, 20.0)]
    found = entries(*seeds)
    disco, btx = found["disco"], found["btx"]
    more = next(entry for entry in summary.summarise(seeds, summary.MORE) if entry["arm"] == "disco")
    assert (disco["corpus"], disco["family"], disco["start"], disco["seeds"]) == ("small", "mixtral", "random", [0, 1, 2])
    assert disco["ppl_equal_tokens"] == pytest.approx(1.25)
    assert more["loss_equal_tokens"] == pytest.approx(math.log(50) / math.log(40))
    assert disco["ppl_equal_dollars"] == pytest.approx(0.75)
    assert disco["spread"]["ppl_equal_dollars"] == {"min": pytest.approx(0.5), "max": pytest.approx(0.9)}
    assert (btx["ppl_equal_tokens"], btx["ppl_equal_dollars"], btx["dollars_to_joint_loss_ratio"]) == (1.5, None, None)


def test_an_entry_has_these_keys_and_no_others():
    for entry in summary.summarise([result(0, 30.0)]):
        assert entry.keys() == {
            "corpus", "family", "start", "arm", "seeds", "ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio",
            "spread"}
        assert entry["spread"].keys() <= {"ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio"}


def test_other_text_is_compared_where_both_were_measured_on_it():
    given = result(0, 30.0)
    given["rows"][0]["unseen"], given["rows"][1]["unseen"] = 80.0, 60.0
    found = {entry["arm"]: entry["unseen_equal_tokens"] for entry in summary.summarise([given], summary.MORE)}
    assert found["disco"] == found["disco-low"] == pytest.approx(0.75)
    assert found["btx"] is None


def test_more_figures_are_told_when_they_are_asked_for():
    disco = next(entry for entry in summary.summarise([result(0, 30.0)], summary.MORE) if entry["arm"] == "disco")
    assert disco["hours_equal_tokens"] == pytest.approx((1.0 + 1.5 / 4) / (JOINT / 4))
    assert disco["hours_equal_dollars"] == pytest.approx((4.0 + 6.0 / 4) / (JOINT / 4))
    # Its runs take 0.55 and 2.2 times joint training's hours: one lies at log 1/0.55 over log 4 of the way between them.
    assert disco["ppl_equal_hours"] == pytest.approx(50 / 40 * (30 / 50) ** (math.log(1 / 0.55) / math.log(4)))
    low = next(entry for entry in summary.summarise([result(0, 30.0)], summary.MORE) if entry["arm"] == "disco-low")
    assert low["hours_equal_tokens"] is low["ppl_equal_hours"] is None    # its price on the other pool does not tell


def test_prices_can_be_others():
    given = result(0, 30.0)
    for each, metered in zip(given["rows"], (8.0, 2.0, 7.0, 4.0), strict=True):
        each["metered_dollars"] = metered
    names = ("dollars_to_joint_loss_ratio", "metered_to_joint_loss")

    def at(price):
        return {entry["arm"]: tuple(entry[name] for name in names) for entry in summary.summarise([given], names, price)}

    # The default's two runs cost 2.5 and 10 dollars; with equal prices for both pools they would cost 6.5 and 26.
    part = math.log(50 / 40) / math.log(50 / 30)
    metered = pytest.approx(2 * (7 / 2) ** part / 8)
    assert at(None) == at(LOW) == {
        "disco": (pytest.approx(0.25 * 4 ** part), metered), "btx": (None, None), "joint-low": (pytest.approx(LOW), None),
        "disco-low": (pytest.approx(0.13 * (5.2 / 1.3) ** part), None)}
    assert at(1.0)["disco"] == (pytest.approx(0.65 * 4 ** part), metered)
    assert at(1.0)["joint-low"] == (1.0, None)
    assert at(1.0)["disco-low"][0] == pytest.approx(at(1.0)["disco"][0])


def test_clocks_are_held_against_joint_training_of_the_same_comparison():
    given = result(0, 30.0)
    # The default was added on a machine that takes twice as long, also for joint training.
    for each, metered in zip(given["rows"], (8.0, 4.0, 14.0, 4.0), strict=True):
        each["metered_dollars"] = metered
    for each in given["rows"][1:3]:
        each["joint_metered_dollars"] = 16.0
    found = next(entry for entry in summary.summarise([given], summary.MORE) if entry["arm"] == "disco")
    assert found["metered_to_joint_loss"] == pytest.approx(2 * (7 / 2) ** (math.log(50 / 40) / math.log(50 / 30)) / 8)


def test_equal_dollars_are_joint_trainings_to_the_last_one():
    given = result(0, 30.0)
    # A run at equal training dollars costs an eighth more in total: 2.5 and 11.25 dollars; joint training costs 10.
    given["rows"][2] = row("disco", "dollars", 30.0, 5.25, 6.0)
    part = math.log(10 / 2.5) / math.log(11.25 / 2.5)
    assert entries(given)["disco"]["ppl_equal_dollars"] == pytest.approx(50 / 40 * (30 / 50) ** part)
    given["rows"][2] = row("disco", "dollars", 30.0, 3.0, 6.0)      # less than joint training's tell nothing of these
    assert entries(given)["disco"]["ppl_equal_dollars"] is None


def test_an_account_of_training_alone_has_no_dollars():
    for old in (0, 1):
        given = result(0, 30.0)
        given["rows"][old]["phases"] = given["rows"][old]["phases"][:2]
        disco = entries(given)["disco"]
        assert (disco["ppl_equal_dollars"], disco["dollars_to_joint_loss_ratio"]) == (None, None)
        assert disco["ppl_equal_tokens"] == pytest.approx(1.25)


RUNS = st.lists(st.tuples(st.floats(0.1, 100), st.floats(2, 100)), min_size=1, max_size=5, unique_by=lambda run: run[0])


@given(RUNS, st.floats(0.1, 100))
def test_what_dollars_buy_lies_between_the_runs_that_cost_less_and_more(runs, dollars):
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



def test_dollars_to_a_loss_lie_between_two_complete_runs():
    # Of the way from 50 to 25 on a log scale, 40 is a third and a bit; the dollars go from 2.5 to 10 meanwhile.
    part = math.log(50 / 40) / math.log(50 / 25)
    assert entries(result(0, 25.0))["disco"]["dollars_to_joint_loss_ratio"] == pytest.approx(2.5 * 4 ** part / JOINT)


def test_the_same_training_is_priced_on_the_cheap_pool():
    found = entries(result(0, 25.0))
    joint, disco = found["joint-low"], found["disco-low"]
    assert (joint["ppl_equal_tokens"], joint["ppl_equal_dollars"], joint["dollars_to_joint_loss_ratio"]) == (1.0, None, LOW)
    assert disco["ppl_equal_tokens"] == pytest.approx(1.25)
    assert disco["ppl_equal_dollars"] is None
    part = math.log(50 / 40) / math.log(50 / 25)
    assert disco["dollars_to_joint_loss_ratio"] == pytest.approx(1.3 * (5.2 / 1.3) ** part / JOINT)


def test_a_seed_that_never_came_down_is_not_passed_over():
    disco = entries(result(0, 30.0), result(1, 41.0))["disco"]
    assert disco["dollars_to_joint_loss_ratio"] is None
    assert "dollars_to_joint_loss_ratio" not in disco["spread"]


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(2, 100)), max_size=6), st.floats(2, 100))
def test_what_a_perplexity_costs_lies_within_what_the_runs_cost(runs, perplexity):
    found = summary.dollars_to(perplexity, runs)
    good = [dollars for dollars, reached in runs if reached <= perplexity]
    assert (found is None) == (not good)
    if found is not None:
        assert min(dollars for dollars, _ in runs) * (1 - 1e-9) <= found <= min(good) * (1 + 1e-9)
