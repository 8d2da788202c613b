"""The document's statements about the result files."""

import json

import pytest

from benchmarks.study.compare.arms import ARMS
from benchmarks.study.quality import levers, section
from benchmarks.study.quality.records import CellFigures, RunFigures, Setting

LOW = 0.2


def run(arm, budget, perplexity, low, high):
    return RunFigures(
        arm=arm, budget=budget, perplexity=perplexity, dollars={"low_memory": (low,), "high_memory": (high,)},
        hours=low + high / 4, metered=(low + 2 * high) / 20)


def result(seed, *runs, tokens=36.0, dollars=20.0, high=1.5, commit="a1", recipe="r1", cell="small/mixtral/seed"):
    return CellFigures(
        command=f"run.py --cell {cell} --corpus DIR", commits=(commit,), date="2026-01-01", processor="P",
        cores=2, versions={"torch": "2"}, cell=cell, seed=seed,
        setting=Setting(model={}, tokens=400_000, seed=seed, recipe=recipe, low_over_high=LOW), runs=(
            run("joint", "tokens", 40.0, 0.0, 10.0), run("disco", "tokens", tokens, 1.0, high),
            run("disco", "dollars", dollars, 4.0, 6.0), *runs))


@pytest.fixture
def published(monkeypatch):
    def publish(*results):
        monkeypatch.setattr(section, "results", lambda: results)

    return publish


def test_the_default_and_its_gang_on_the_cheap_pool_have_a_verdict_each(published):
    # Joint training on the cheap pool costs 0.2 of its dollars; the default 0.25 as it is, 0.13 with its gang there.
    published(result(0))
    default, gang = section.verdicts()[-2:]
    assert default == (
        "* cheaper than joint training on the low-memory pool alone, the default as configured: **missed** in small/mixtral/seed")
    assert gang == (
        "* cheaper than joint training on the low-memory pool alone, the default with its gang there too: "
        "met in all 1 cells that were run")
    published(result(0, high=0.5))
    assert all("met in all 1 cells" in line for line in section.verdicts()[-2:])


def test_costs_are_shown_at_other_prices_too(published):
    published(result(0), result(0, tokens=60.0, dollars=50.0, cell="large/mixtral/seed"))     # which never comes to that loss
    lines = section.prices()
    assert lines[0] == ["0.10 of one on the other", "never (0.20 to 0.20; never in 1 of 2 cells)", "never"]
    published(result(0), result(0, high=0.5, cell="large/mixtral/seed"))
    assert lines[-1][0] == "1.00 of one on the other (one price: operations alone)"
    # 1 dollar on the cheap pool at 0.2 is 5 at 1; 1.5 and 0.5 on the other.
    assert section.prices()[-1][1] == "0.60 (0.55 to 0.65)"


def test_a_loss_for_as_many_tokens_is_judged_though_the_summary_has_none(published):
    start = "* `loss_equal_tokens` of the default at most 1.01, from a common seed: "
    for tokens, end in ((41.0, "met in all 1 cells that were run"), (42.0, "**missed** in small/mixtral/seed")):
        published(result(0, tokens=tokens))
        assert start + end in section.verdicts()


def test_a_lever_is_held_against_the_default_of_its_own_seeds(published):
    lever = run("no-rounds", "tokens", 44.0, 1.0, 1.5)
    published(result(0, lever, tokens=36.0), result(1, tokens=32.0), result(2, lever, tokens=38.0))
    (found,) = section.levers()
    assert found == [
        "small, mixtral, seed", levers.KNOWN["no-rounds"].title, "2", "1.10 (1.10 to 1.10)", "0.93 (0.90 to 0.95)",
        "1.190 (1.158 to 1.222)"]


def test_the_table_has_hours_and_metered_dollars(published):
    published(result(0))
    assert section.HEAD[-2:] == ["hours, equal tokens", "hours, equal dollars"]
    by_arm = {found[1]: found for found in section.rows()}
    assert by_arm[ARMS["disco"].title][3:] == ["0.90", "0.50", "0.70", "0.25", "-", "0.20", "0.25", "0.55", "2.20"]
    assert by_arm["MoE-DisCo, as configured, its gang on the low-memory pool"][-2:] == ["-", "-"]
    assert all(len(found) == len(section.HEAD) for found in section.rows())


def test_software_and_machines_are_named_once(published):
    published(result(0), result(1, commit="b2"), result(0, commit="b2", recipe="r2", cell="small/mixtral/random"))
    words = section.made_with()
    assert "`run.py --cell CELL --corpus DIR`; commit a1, b2; recipe r1 (mixtral/seed), r2 (mixtral/random); seed 0, 1; " in words
    assert words.count("2026-01-01") == words.count("torch 2") == words.count("low_over_high") == 1
    assert section.joint_tokens() == "400,000"


def test_what_was_tried_is_whole():
    tried = json.loads(section.TRIED.read_text(encoding="utf-8"))
    assert all(each.keys() == {"what", "measured", "commit", "verdict"} for each in tried)
    assert len(section.tried()) == len(tried)
