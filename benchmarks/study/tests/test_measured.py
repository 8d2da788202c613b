from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from measured_example import base_config, comparison, only, stored

from benchmarks.study.advice.measured import read_measurements
from moedisco_ray.core.artifacts import write_json
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.events import Event

BASE = base_config()


def write_run(directory: Path, end: str = "run_finished", **sections: Any) -> Path:
    (directory / "evaluation").mkdir(parents=True)
    write_json(directory / "config.json", base_config(**sections).model_dump(mode="json"))
    write_json(directory / "evaluation" / "evaluation.json", {"loss": 3.25, "perplexity": 25.8})
    events = [Event("run_started"), Event("run_finished"), Event("run_started"), Event(end), Event("heartbeat")]
    (directory / "events.jsonl").write_text("".join(f"{event.to_json()}\n" for event in events))
    return directory


def test_a_comparison_by_its_file_or_its_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "compare.json", stored(comparison(BASE, seed=3)))
    found = read_measurements([tmp_path])
    assert found == read_measurements([tmp_path / "compare.json"]) == read_measurements([tmp_path, tmp_path])
    assert [run.reference for run in found.runs].count(True) == 1
    assert {run.seed for run in found.runs} == {3}
    rows = comparison(BASE, seed=3).rows
    assert {(run.title, run.tokens): run.loss for run in found.runs} == {(row.title, row.tokens): row.loss for row in rows}


def test_a_folder_of_results_with_another_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_json(tmp_path / f"cell-{seed}.json", {"cell": "small/qwen3_moe/random", **stored(comparison(BASE, seed=seed))})
    write_json(tmp_path / "summary.json", [{"corpus": "small"}])
    assert {run.seed for run in read_measurements([tmp_path]).runs} == {0, 1}


def test_an_ensemble_does_not_count(tmp_path: Path) -> None:
    def law(tokens: float) -> float:
        return 3.0

    write_json(tmp_path / "compare.json", stored(comparison(BASE, {"joint": law, "ensemble": law})))
    found = read_measurements([tmp_path])
    assert [run.title for run in found.runs] == ["joint, high-memory pool"]
    assert found.set_aside == ("ensembles: they are no model that a run ends with",)


def test_a_run_directory(tmp_path: Path) -> None:
    disco = write_run(tmp_path / "disco", name="disco", seed=5, submodels={"sync_every": 100})
    joint = write_run(tmp_path / "joint", name="joint", tokens={"total": 1_000_000, "seed_share": 0, "finetune_share": 1})
    by_title = {run.title: run for run in read_measurements([disco, joint]).runs}
    assert (by_title["disco"].tokens, by_title["disco"].loss, by_title["disco"].seed) == (40_000_000, 3.25, 5)
    assert (by_title["disco"].sync_every, by_title["disco"].rounds) == (100, 4)    # 335 steps of a sub-model
    assert (by_title["joint"].reference, by_title["joint"].rounds) == (True, None)


def test_a_run_that_a_comparison_made_counts_once(tmp_path: Path) -> None:
    def law(tokens: float) -> float:
        return 3.25

    table = only(comparison(BASE, {"joint": law, "disco": law}), lambda row: row.budget == "tokens")
    write_json(tmp_path / "compare.json", stored(table))
    run = write_run(tmp_path / "disco-tokens")
    found = read_measurements([run, tmp_path])
    assert len(found.runs) == 2
    assert found == read_measurements([tmp_path, run])


@pytest.mark.parametrize("end", ["run_started", "run_failed", "run_stopped"])
def test_a_run_that_is_not_finished_is_set_aside(tmp_path: Path, end: str) -> None:
    going = write_run(tmp_path / "going", end)
    with pytest.raises(RunDirError, match=r"--from: no finished run to advise from \(.*going: not finished\)"):
        read_measurements([going])
    assert read_measurements([write_run(tmp_path / "done"), going]).set_aside == (f"{going}: not finished",)


def _without(name: str) -> dict[str, Any]:
    table = stored(comparison(BASE))
    del table["rows"][1][name]
    return table


def _with_loss(loss: float) -> dict[str, Any]:
    table = stored(comparison(BASE))
    table["rows"][1]["loss"] = loss
    return table


@pytest.mark.parametrize(("content", "line"), [
    ([], "holds no comparison (`python -m benchmarks.study compare` writes one) and no run"),
    (_without("recipe"), "rows.1.recipe is missing; repeat the comparison, or leave the file out"),
    (_without("loss"), "rows.1.loss is missing; repeat the comparison, or leave the file out"),
    (_with_loss(float("nan")), "rows.1.loss must be a finite number; repeat the comparison, or leave the file out"),
])
def test_a_file_without_usable_rows_is_one_line(tmp_path: Path, content: Any, line: str) -> None:
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RunDirError) as caught:
        read_measurements([path])
    assert str(caught.value) == f"--from: '{path}': {line}"


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "compare.json"
    broken.write_text('{"rows": [')
    directory = write_run(tmp_path / "odd")
    write_json(directory / "config.json", {"name": "odd", "tokns": 1})
    for path, line in (
            (broken, "cannot be read"), (directory, "cannot be read"), (tmp_path / "none", "holds no comparison")):
        with pytest.raises(RunDirError, match=line) as caught:
            read_measurements([path])
        assert "\n" not in str(caught.value)
