"""The committed comparison on held-out domains ranks the arms as the tuned benchmark does."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2]


def test_compare_ranks_the_arms_on_held_out_domains_as_the_tuned_benchmark_does():
    result = json.loads((BENCHMARKS / "results" / "ranking.json").read_text(encoding="utf-8"))
    assert not result["dirty"]
    assert result["seeds"]
    for seed in result["seeds"]:
        assert seed["compare"]["ranking"] == seed["benchmark"]["ranking"]
        assert all(seed["compare"]["loss"][arm] <= loss + 1e-9 for arm, loss in seed["as configured"]["loss"].items())
