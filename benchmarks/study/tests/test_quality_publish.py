"""The published files, made from raw results."""

import pytest

from benchmarks.study.quality import publish, result_files
from benchmarks.study.quality.records import CellFigures

SETTING = {"model": {"num_experts": 4}, "tokens": 400_000, "seed": 0, "recipe": "r1", "low_over_high": 0.2}


def row(arm, budget, metered, **changes):
    points = [
        {"stage": stage, "tokens": 10 * i, "dollars": i / 3, "hours": i / 7, "metered_dollars": 1.0, "metered_hours": 1.0,
         "loss": 5 - i / 3} for i, stage in enumerate(("seed", "seed", "finetune"), 1)]
    phases = [
        {"stage": "submodels", "pool": "low_memory", "dollars": 1 / 3}, {"stage": "merge", "pool": "high_memory", "dollars": 0.1},
        {"stage": "finetune", "pool": "high_memory", "dollars": 0.2}]
    return {
        "arm": arm, "budget": budget, "perplexity": 100 / 3, "hours": 1 / 3, "metered_dollars": metered, "unseen": 200 / 3,
        "phases": phases, "bits_per_byte": 2.0, "specialisation": {"cluster": None, "source": 1 / 3}, "dead_experts": 1,
        "worker_seconds": {"low_memory": 1.0, "high_memory": 2.0}, "sources": {"go": 10 / 3}, "curve": points, **changes}


def result(cell, seed, *rows):
    return {
        "command": "run.py", "commit": "a1", "dirty": False, "commits": ["a1"], "date": "2026-01-01", "processor": "P", "cores": 2,
        "system": "S", "versions": {"torch": "2"}, "setting": SETTING, "seconds": 1.0, "cell": cell, "seed": seed,
        "rows": [row("joint", "tokens", 4.0), *rows]}


def test_perplexities_and_dollars_keep_all_their_digits():
    found = publish.condensed(result("small/mixtral/seed", 0, row("btx", "tokens", 2.0)))
    joint, btx = found.runs
    assert (joint.perplexity, joint.total_dollars) == (100 / 3, 1 / 3 + 0.1 + 0.2)
    assert joint.dollars == {"low_memory": (1 / 3,), "high_memory": (0.1, 0.2)}
    assert (joint.hours, joint.unseen) == (0.3333333, 66.66667)
    assert joint.absolute.worker_seconds == 3.0
    assert btx.absolute is None      # only the arms of these tables have absolute figures


def test_metered_dollars_are_relative_to_joint_training_of_the_same_comparison():
    added = row("spes", "tokens", 4.0, joint_metered_dollars=16.0)      # on a machine that takes four times as long
    found = publish.condensed(result("small/mixtral/seed", 0, row("btx", "tokens", 2.0), added))
    assert [run.metered for run in found.runs] == [1.0, 0.5, 0.25]


def test_only_the_figures_cells_and_seeds_are_drawn_and_without_levers(tmp_path):
    raw, folder = tmp_path / "raw", tmp_path / "published"
    for cell, seed in (("small/qwen3_moe/seed", 0), ("small/qwen3_moe/seed", 1), ("small/mixtral/seed", 0)):
        rows = row("disco", "tokens", 1.0), row("disco", "loss", 1.0), row("no-rounds", "tokens", 1.0)
        result_files.write(raw / f"{cell.replace('/', '-')}-{seed}.json", result(cell, seed, *rows))
    publish.publish(raw, folder)
    (drawn,) = result_files.read_lines(folder / result_files.CURVES, publish.Drawing)
    assert (drawn.name, drawn.target_loss) == ("small/qwen3_moe/seed", 4.0)
    assert [(run.arm, run.budget) for run in drawn.runs] == [("joint", "tokens"), ("disco", "tokens")]
    seed, finetune = drawn.runs[0].lines
    assert (seed.stage, seed.tokens, seed.loss) == ("seed", (10, 20), (5 - 1 / 3, 5 - 2 / 3))
    assert (finetune.stage, finetune.dollars) == ("finetune", (1.0,))


def test_a_cell_without_a_raw_result_stays_as_published(tmp_path):
    raw, folder = tmp_path / "raw", tmp_path / "published"
    for seed in (0, 1):
        result_files.write(raw / f"{seed}.json", result("small/qwen3_moe/seed", seed, row("disco", "tokens", 2.0)))
    publish.publish(raw, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"cells.jsonl", "curves.jsonl", "summary.json"}
    (raw / "0.json").unlink()
    publish.publish(raw, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    result_files.write(raw / "1.json", result("small/qwen3_moe/seed", 1, row("disco", "tokens", 2.0, perplexity=50.0)))
    publish.publish(raw, folder)
    first, second = result_files.read_lines(folder / result_files.CELLS, CellFigures)
    assert (first.runs[1].perplexity, second.runs[1].perplexity) == (100 / 3, 50.0)
    assert publish.read(folder / "summary.json")[0]["ppl_equal_tokens"] == pytest.approx(1.25)
