"""Raw results, and the published files made from them."""

import argparse
import json
from types import SimpleNamespace

import pytest

from benchmarks.study.compare.figures import Drawing
from benchmarks.study.compare.records import PhaseCost, Point, Row
from benchmarks.study.quality import publish, result_files
from benchmarks.study.quality import run as quality
from benchmarks.study.quality.cells import Cell
from benchmarks.study.quality.records import CellFigures, CellResult, Setting
from moedisco_ray.core.artifacts import read_json

SETTING = Setting(model={"num_experts": 4}, tokens=400_000, seed=0, recipe="r1", low_over_high=0.2)


def phase(stage, pool, dollars):
    return PhaseCost(stage=stage, pool=pool, steps=1, tokens=1, flops=1.0, hours=1.0, dollars=dollars)


def row(arm, budget, metered, **changes):
    points = (
        Point(stage=stage, tokens=10 * i, dollars=i / 3, hours=i / 7, metered_dollars=1.0, metered_hours=1.0, loss=5 - i / 3)
        for i, stage in enumerate(("seed", "seed", "finetune"), 1))
    return Row(
        arm=arm, title=arm.upper(), budget=budget, run=f"{arm}-{budget}", recipe={}, measured="finetune",
        tokens=10, flops=1.0, dollars=1 / 3 + 0.1 + 0.2, hours=1 / 3, metered_dollars=metered, joint_metered_dollars=4.0, loss=4.0,
        phases=(phase("submodels", "low_memory", 1 / 3), phase("merge", "high_memory", 0.1), phase("finetune", "high_memory", 0.2)),
        worker_seconds={"low_memory": 1.0, "high_memory": 2.0}, perplexity=100 / 3, bits_per_byte=2.0, sources={"go": 10 / 3},
        specialisation={"cluster": None, "source": 1 / 3}, dead_experts=1, unseen=200 / 3, curve=tuple(points),
    ).model_copy(update=changes)


def result(cell, seed, *rows):
    return CellResult(
        command="run.py", commits=("a1",), date="2026-01-01", processor="P", cores=2, versions={"torch": "2"}, setting=SETTING,
        seconds=1.0, cell=cell, seed=seed, rows=(row("joint", "tokens", 4.0), *rows))


def store(folder, *results):
    for each in results:
        result_files.write(folder / f"{each.cell.replace('/', '-')}-{each.seed}.json", each.model_dump(mode="json"))


def test_perplexities_and_dollars_keep_all_their_digits():
    joint, btx = publish.condensed(result("small/mixtral/seed", 0, row("btx", "tokens", 2.0))).runs
    assert (joint.perplexity, joint.total_dollars) == (100 / 3, 1 / 3 + 0.1 + 0.2)
    assert joint.dollars == {"low_memory": (1 / 3,), "high_memory": (0.1, 0.2)}
    assert (joint.hours, joint.unseen) == (0.3333333, 66.66667)
    assert joint.absolute.worker_seconds == 3.0
    assert btx.absolute is None      # only the arms of these tables have absolute figures


def test_metered_dollars_are_relative_to_joint_training_of_the_same_comparison():
    added = row("spes", "tokens", 4.0, joint_metered_dollars=16.0)      # on a machine that takes four times as long
    found = publish.condensed(result("small/mixtral/seed", 0, row("btx", "tokens", 2.0), added))
    assert [run.metered for run in found.runs] == [1.0, 0.5, 0.25]


def test_one_family_and_seed_is_drawn_without_levers(tmp_path):
    rows = row("disco", "tokens", 1.0), row("disco", "loss", 1.0), row("no-rounds", "tokens", 1.0)
    store(tmp_path / "raw", *(result(cell, seed, *rows) for cell, seed in (
        ("small/qwen3_moe/seed", 0), ("small/qwen3_moe/seed", 1), ("small/mixtral/seed", 0))))
    publish.publish(tmp_path / "raw", tmp_path / "published")
    (drawn,) = result_files.read_lines(tmp_path / "published" / result_files.CURVES, Drawing)
    assert (drawn.name, drawn.target_loss) == ("small/qwen3_moe/seed", 4.0)
    assert [(run.arm, run.budget) for run in drawn.runs] == [("joint", "tokens"), ("disco", "tokens")]
    seed, finetune = drawn.runs[0].lines
    assert (seed.stage, seed.tokens, seed.loss) == ("seed", (10, 20), (4.666667, 4.333333))    # seven digits
    assert (finetune.stage, finetune.dollars) == ("finetune", (1.0,))


def test_a_cell_without_a_raw_result_stays_as_published(tmp_path):
    raw, folder = tmp_path / "raw", tmp_path / "published"
    cell, disco = "small/qwen3_moe/seed", row("disco", "tokens", 2.0)
    store(raw, result(cell, 0, disco), result(cell, 1, disco))
    publish.publish(raw, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"cells.jsonl", "curves.jsonl", "summary.json"}
    (raw / "small-qwen3_moe-seed-0.json").unlink()
    publish.publish(raw, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    store(raw, result(cell, 1, disco.model_copy(update={"perplexity": 50.0})))
    publish.publish(raw, folder)
    first, second = result_files.read_lines(folder / result_files.CELLS, CellFigures)
    assert (first.runs[1].perplexity, second.runs[1].perplexity) == (100 / 3, 50.0)
    assert read_json(folder / "summary.json")[0]["ppl_equal_tokens"] == pytest.approx(1.25)


def test_only_missing_arms_are_measured_and_added_to_the_raw_result(tmp_path, monkeypatch):
    commits = iter(("a1", "b2"))
    asked = []

    def measure(command, **_):
        arms = command[command.index("--arms") + 1]
        asked.append(arms)
        machine = {"disco": 4.0, "btx": 8.0}[arms]      # joint training takes twice as long on the second day
        rows = [row(arm, "tokens", machine, joint_metered_dollars=machine) for arm in ("joint", arms)]
        return SimpleNamespace(stdout=f"progress\n{json.dumps([each.to_json() for each in rows])}\n")

    monkeypatch.setattr(quality.subprocess, "run", measure)
    monkeypatch.setattr(quality, "environment", lambda command: {
        "command": command, "commit": next(commits), "dirty": True, "date": "2026-01-01", "processor": "P", "cores": 2,
        "versions": {}})
    cell = Cell("small", "mixtral", "seed")
    for arms in (["disco"], ["disco"], ["disco", "btx"]):
        quality.run_process(cell, 0, argparse.Namespace(
            arms=arms, results=tmp_path, tokens=400_000, work=tmp_path, corpus=None, seeds=1))
    assert asked == ["disco", "btx"]
    found = result_files.read(tmp_path / "small-mixtral-seed-0.json")
    assert [(each.arm, each.joint_metered_dollars) for each in found.rows] == [("joint", 4.0), ("disco", 4.0), ("btx", 8.0)]
    assert found.commits == ("a1 with uncommitted changes", "b2 with uncommitted changes")
    assert found.setting.low_over_high == pytest.approx(0.35 / 2.28 / 0.72)
    other = argparse.Namespace(arms=["disco"], results=tmp_path, tokens=1, work=tmp_path, corpus=None, seeds=1)
    with pytest.raises(SystemExit, match="was measured with another setting or recipe; move it away"):
        quality.run_process(cell, 0, other)
