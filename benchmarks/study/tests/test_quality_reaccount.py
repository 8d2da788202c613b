"""Result files recomputed with the present accounting, from their run directories."""

from pathlib import Path

from small_run import small_config

from benchmarks.study.compare.run import compare
from benchmarks.study.quality import reaccount
from moedisco_ray.execution.local_backend import LocalBackend


def test_rows_are_accounted_anew_from_their_runs_or_kept(tmp_path: Path) -> None:
    looks = {"max_tokens": 2000, "every_tokens": 4096}
    base = small_config(tmp_path, tokens={"total": 8000, "seed_share": 0.0}, evaluation=looks)
    (joint,) = compare(base, tmp_path / "compared", ["joint"], budgets=("tokens",), backend=LocalBackend())["rows"]
    # As an earlier version wrote it: the training alone, and nothing of its sources.
    old = {name: value for name, value in joint.items() if name != "sources"} | {"phases": joint["phases"][:1], "dollars": 1.0}
    result = {"command": "run.py", "cell": "small/qwen3_moe/random", "seed": 0, "rows": [
        old, {**old, "run": "gone"}, {**old, "loss": 9.0}]}
    anew, kept = reaccount.reaccounted(result, tmp_path / "compared")
    assert anew == {**result, "command": "run.py --corpus DIR", "rows": [joint, *result["rows"][1:]]}
    assert [line.partition(":")[0] for line in kept] == ["gone is as it was", "joint-tokens is as it was"]
    assert "holds another run" in kept[1]
    assert reaccount.reaccounted(anew, tmp_path / "compared")[0] == anew


def test_a_command_names_a_place_for_corpora_where_it_needs_one() -> None:
    assert reaccount.repeatable("run.py", "small/qwen3_moe/random") == "run.py --corpus DIR"
    assert reaccount.repeatable("run.py --corpus DIR", "small/qwen3_moe/random") == "run.py --corpus DIR"
    assert reaccount.repeatable("run.py", "embedded/qwen3_moe/random") == "run.py"
