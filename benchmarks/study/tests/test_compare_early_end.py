"""An arm whose fine-tune ends early: what it is charged, and what its length says of longer and shorter runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config

from benchmarks.study.advice.measured import comparison_runs, read_measurements
from benchmarks.study.compare import run as comparison
from benchmarks.study.compare.accounting import account
from benchmarks.study.compare.arms import ARMS, predicted
from benchmarks.study.compare.reading import found
from moedisco_ray.core.artifacts import read_manifest, write_json
from moedisco_ray.core.config import RunConfig
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.plan import build_plan

STEPS, MADE = 46, 32
"""5,888 of the fine-tune's 6,000 tokens in batches of 128; and as many as have to be looked at before it may end."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("compared")
    base = small_config(
        output, tokens={"total": 24_000, "seed_share": 0.25, "finetune_share": 0.25}, merge={"calibration_tokens": 1024},
        evaluation={"max_tokens": 3000, "slice_tokens": 3000, "every_tokens": 1024},
        finetune={"optimizer": {"batch_tokens": 128, "lr": 1e-3}, "early_stop": 1e9})
    yield base, output, comparison.compare(base, output, ["disco"], budgets=("tokens",), backend=LocalBackend())
    torch.set_num_threads(before)


def config_of(output: Path, row: Any) -> RunConfig:
    return RunConfig.model_validate_json((output / row["run"] / "config.json").read_text())


def test_it_pays_for_the_steps_that_it_made(compared: Any) -> None:
    _, output, result = compared
    joint, disco = result["rows"]
    units = read_manifest(output / "disco-tokens" / "finetuned").summary["units"]
    assert [(unit["steps"], unit["planned_steps"], unit["tokens"]) for unit in units] == [(MADE, STEPS, MADE * 128)]
    config = config_of(output, disco)
    planned = {phase.stage: phase for phase in account(config, build_plan(config), found(config, "finetune"))}
    phases = {phase["stage"]: phase for phase in disco["phases"]}
    assert list(phases) == list(planned) == ["seed", "cluster", "submodels", "merge", "finetune", "evaluate"]
    for name in ("flops", "hours", "dollars"):
        assert phases["finetune"][name] == pytest.approx(MADE / STEPS * getattr(planned["finetune"], name))
        assert all(phases[stage][name] == getattr(planned[stage], name) for stage in planned if stage != "finetune")
        assert disco[name] == pytest.approx(sum(phase[name] for phase in disco["phases"]))
    assert (planned["finetune"].steps, planned["finetune"].tokens) == (STEPS, 6000)
    assert (phases["finetune"]["steps"], phases["finetune"]["tokens"]) == (MADE, 4174)      # 6,000 x 32 / 46
    assert (disco["tokens"], disco["planned_tokens"]) == (18_000 + 4174, 24_000)
    # Joint training never ends early, as an arm.
    assert (joint["tokens"], joint["planned_tokens"]) == (24_000, 24_000)


def test_its_curve_is_what_it_would_be_of_the_whole_plan_and_ends_with_what_it_paid(compared: Any) -> None:
    _, output, result = compared
    disco = result["rows"][1]
    config = config_of(output, disco)
    stages = {stage.stage: stage.cost for stage in build_plan(config).stages}
    phases = {phase["stage"]: phase for phase in disco["phases"]}
    *_, before_last, last = disco["curve"]
    assert (before_last["tokens"], last["tokens"]) == (18_000 + 24 * 128, 18_000 + MADE * 128)
    step = stages["finetune"].dollars / stages["finetune"].tokens * 128
    assert last["dollars"] - before_last["dollars"] == pytest.approx(8 * step, rel=1e-3)
    # The plan has 112 tokens more than whole steps, in equal parts beside each.
    spent = disco["dollars"] - phases["evaluate"]["dollars"]
    assert last["dollars"] == pytest.approx(spent - phases["finetune"]["dollars"] * 112 / 6000, rel=1e-3)


def test_advice_and_a_third_run_go_by_what_was_planned(compared: Any, tmp_path: Path) -> None:
    base, output, result = compared
    assert [run.tokens for run in comparison_runs(result, "compare.json")] == [24_000, 24_000]
    # The same run, found twice.
    found = read_measurements([output / "compare.json", output / "disco-tokens"])
    assert sorted(run.title for run in found.runs) == sorted(row["title"] for row in result["rows"])
    rows = [{"arm": "joint", "tokens": 1000, "planned_tokens": 1000, "loss": 3.5}, *(
        {"arm": "disco", "tokens": planned - 100, "planned_tokens": planned, "loss": loss}
        for planned, loss in ((600, 4.0), (1200, 3.0)))]
    third = comparison._config(base, ("disco", ARMS["disco"]), "loss", tmp_path, None, rows)
    assert third.tokens.total == predicted([(600, 4.0), (1200, 3.0)], 3.5) == round(600 * 2**0.5)


def test_what_an_earlier_version_wrote_counts_as_planned(compared: Any, tmp_path: Path) -> None:
    result = compared[2]
    rows = [{name: value for name, value in row.items() if name != "planned_tokens"} for row in result["rows"]]
    write_json(tmp_path / "compare.json", {**result, "rows": rows})
    assert sorted(run.tokens for run in read_measurements([tmp_path]).runs) == [result["rows"][1]["tokens"], 24_000]
