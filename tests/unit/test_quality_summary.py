import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "quality"))


@pytest.fixture
def summary():
    return pytest.importorskip("summary")


def row(arm, budget, perplexity, reached, dollars=10.0):
    return {"arm": arm, "budget": budget, "perplexity": perplexity, "dollars_to_target": reached, "dollars": dollars}


def result(seed, disco, reached, cell="small/mixtral/random"):
    return {"cell": cell, "seed": seed, "rows": [
        row("joint", "tokens", 40.0, 10.0), row("disco", "tokens", 44.0, None), row("disco", "dollars", disco, reached),
        row("btx", "tokens", 60.0, None)]}


def test_ratios_are_medians_of_each_seeds_own(summary):
    disco, btx = summary.summarise([result(0, 30.0, 4.0), result(1, 36.0, 3.0), result(2, 20.0, 5.0)])
    assert (disco["corpus"], disco["family"], disco["start"], disco["arm"], disco["seeds"]) == (
        "small", "mixtral", "random", "disco", [0, 1, 2])
    assert disco["ppl_equal_tokens"] == pytest.approx(1.1)
    assert disco["ppl_equal_dollars"] == pytest.approx(0.75)
    assert disco["dollars_to_joint_loss_ratio"] == pytest.approx(0.4)
    assert disco["spread"]["ppl_equal_dollars"] == {"min": pytest.approx(0.5), "max": pytest.approx(0.9)}
    assert (btx["ppl_equal_tokens"], btx["ppl_equal_dollars"], btx["dollars_to_joint_loss_ratio"]) == (1.5, None, None)


def test_a_seed_that_never_came_down_is_not_passed_over(summary):
    disco, _ = summary.summarise([result(0, 30.0, 4.0), result(1, 36.0, None)])
    assert disco["dollars_to_joint_loss_ratio"] is None
    assert "dollars_to_joint_loss_ratio" not in disco["spread"]
