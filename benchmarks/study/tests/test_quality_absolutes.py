"""Absolute figures that the document shows in addition to the ratios."""


from benchmarks.study.quality import absolutes


def row(arm, budget, perplexity, **domains):
    return {
        "arm": arm, "title": arm.upper(), "budget": budget, "perplexity": perplexity, "bits_per_byte": perplexity / 50,
        "unseen": 99.0, "specialisation": {"source": 0.25, "cluster": None if arm == "joint" else 0.5}, "dead_experts": 1,
        "sources": domains, "worker_seconds": {"low_memory": 10.0, "high_memory": 2.0}}


def result(joint, ours, cell="small/mixtral/seed"):
    return {"cell": cell, "rows": [
        row("joint", "tokens", joint, go=10.0, prose=100.0), row("disco", "tokens", ours, go=12.0, prose=100.0),
        row("disco", "dollars", ours / 2, go=5.0, prose=60.0), row("btx", "tokens", 1.0, go=1.0, prose=1.0)]}


def test_medians_over_the_seeds_of_what_arms_reach_at_as_many_tokens():
    assert absolutes.rows([result(40.0, 50.0), result(42.0, 56.0), result(41.0, 53.0)]) == [
        ["small, mixtral, seed", "JOINT", "41.0", "0.820", "99.0", "0.25", "-", "1", "12"],
        ["small, mixtral, seed", "DISCO", "53.0", "1.060", "99.0", "0.25", "0.50", "1", "12"]]
    assert all(len(found) == len(absolutes.HEAD) for found in absolutes.rows([result(1.0, 1.0)]))


def test_every_domain_is_told_over_all_cells_of_its_corpus():
    found = absolutes.domains([result(40.0, 50.0), result(40.0, 50.0, "large/mixtral/seed")])
    assert found == [
        ["large, go", "10.0", "1.20", "0.50"], ["large, prose", "100.0", "1.00", "0.60"],
        ["small, go", "10.0", "1.20", "0.50"], ["small, prose", "100.0", "1.00", "0.60"]]
    without = result(40.0, 50.0)
    without["rows"] = without["rows"][:2]    # the arms at equal dollars were not run
    assert absolutes.domains([without]) == []
