"""Absolute figures that the document shows in addition to the ratios."""


from benchmarks.study.quality import absolutes
from benchmarks.study.quality.levers import TITLES
from benchmarks.study.quality.records import AbsoluteFigures, CellFigures, RunFigures


def run(arm, budget, perplexity, **domains):
    return RunFigures(
        arm=arm, budget=budget, perplexity=perplexity, dollars={}, unseen=99.0, absolute=AbsoluteFigures(
            bits_per_byte=perplexity / 50, dead_experts=1, worker_seconds=12.0, sources=domains,
            specialisation={"source": 0.25, "cluster": None if arm == "joint" else 0.5}))


def result(joint, ours, cell="small/mixtral/seed"):
    return CellFigures.model_construct(cell=cell, runs=(
        run("joint", "tokens", joint, go=10.0, prose=100.0), run("disco", "tokens", ours, go=12.0, prose=100.0),
        run("disco", "dollars", ours / 2, go=5.0, prose=60.0),
        RunFigures(arm="btx", budget="tokens", perplexity=1.0, dollars={})))


def test_rows_are_medians_over_the_seeds_at_equal_tokens():
    assert absolutes.rows([result(40.0, 50.0), result(42.0, 56.0), result(41.0, 53.0)]) == [
        ["small, mixtral, seed", TITLES["joint"], "41.0", "0.820", "99.0", "0.25", "-", "1", "12"],
        ["small, mixtral, seed", TITLES["disco"], "53.0", "1.060", "99.0", "0.25", "0.50", "1", "12"]]
    assert all(len(found) == len(absolutes.HEAD) for found in absolutes.rows([result(1.0, 1.0)]))


def test_a_domain_has_one_row_over_all_cells_of_its_corpus():
    found = absolutes.domains([result(40.0, 50.0), result(40.0, 50.0, "large/mixtral/seed")])
    assert found == [
        ["large, go", "10.0", "1.20", "0.50"], ["large, prose", "100.0", "1.00", "0.60"],
        ["small, go", "10.0", "1.20", "0.50"], ["small, prose", "100.0", "1.00", "0.60"]]
    without = result(40.0, 50.0)
    without = without.model_copy(update={"runs": without.runs[:2]})    # the arms at equal dollars were not run
    assert absolutes.domains([without]) == []
