"""Every arm of a comparison is tuned by the same sweep."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_run import small_config

from benchmarks.study.compare import run as comparison
from benchmarks.study.compare.arms import ARMS, REFERENCE
from benchmarks.study.compare.run import compare
from benchmarks.study.compare.table import compare_view
from benchmarks.study.compare.tuning import (
    MOST_TRAININGS,
    START,
    Step,
    arm_at,
    climb,
    slice_config,
    stored_result,
    sweep_key,
    tune,
)
from benchmarks.study.recipe import recipe
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import NotFiniteError, TrainingError
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.execution.local_backend import LocalBackend

SMALL = {
    "tokens": {"total": 24_000, "seed_share": 0.25, "finetune_share": 0.25},
    "clusters": {"count": 2, "vectors": "hidden_state"},
    "evaluation": {"max_tokens": 3000, "every_tokens": 8192, "stages": False},
    "merge": {"calibration_tokens": 1024},
    "checkpoint": {"every": 100_000},
}


def base_config(output: Path, *, lr: float = 2e-3, **changes: Any) -> RunConfig:
    return small_config(
        output,
        **{
            **SMALL,
            "submodels": {"optimizer": {"batch_tokens": 256, "lr": lr}},
            "finetune": {"optimizer": {"batch_tokens": 256, "lr": lr / 2, "schedule": "cosine", "warmup": 0.05}},
            **changes,
        },
    )


@given(st.integers(-2, 2), st.integers(-2, 2), st.integers(0, 1), st.floats(0.1, 3.0), st.floats(-0.9, 0.9))
def test_the_climb_finds_the_bottom_of_a_bowl_within_its_budget(
    batch: int, rate: int, schedule: int, scale: float, tilt: float
) -> None:
    measured = []

    def loss(step: Step) -> float:
        measured.append(step)
        x, y = step[0] - batch, step[1] - rate
        # Larger batches bear higher rates: tilt is above 0 in practice.
        return scale * (x * x + y * y - tilt * x * y) + (step[2] != schedule)

    found = climb(loss, most=100)
    assert len(measured) == len(set(measured))
    if tilt >= 0:
        assert found == (batch, rate, schedule)
    assert climb(loss, MOST_TRAININGS) in measured


def test_the_climb_keeps_what_is_configured_on_a_plain_and_where_all_else_fails() -> None:
    seen = []
    assert climb(lambda step: seen.append(step) or 1.0, 100) == START
    assert len(seen) == 8
    assert climb(lambda step: 5.0 if step == START else None, 100) == START
    assert climb({}.get, 100) == START
    trainings = []
    climb(lambda step: trainings.append(step) or float(-sum(step[:2])), MOST_TRAININGS)
    assert len(trainings) == MOST_TRAININGS


@pytest.mark.parametrize("name", ARMS)
def test_a_step_on_the_grid_scales_both_phases_alike(tmp_path: Path, name: str) -> None:
    base = base_config(tmp_path)
    start = slice_config(base, name, ARMS[name], tmp_path, 6000)
    moved = slice_config(base, name, arm_at(start, ARMS[name], (1, -1, 0)), tmp_path, 6000)
    for section in ("submodels", "finetune"):
        before, after = getattr(start, section).optimizer, getattr(moved, section).optimizer
        assert after.batch_tokens == 2 * before.batch_tokens
        assert after.lr == before.lr / 2
    assert slice_config(base, name, arm_at(start, ARMS[name], START), tmp_path, 6000) == start


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_has_a_second_schedule_of_its_last_training(tmp_path: Path, name: str) -> None:
    base = base_config(tmp_path)
    start = slice_config(base, name, ARMS[name], tmp_path, 6000)
    other = slice_config(base, name, arm_at(start, ARMS[name], (0, 0, 1)), tmp_path, 6000)
    last, first = ("finetune", "submodels") if start.tokens.finetune else ("submodels", "finetune")
    assert getattr(other, last).optimizer.schedule in {"cosine", "wsd"} - {getattr(start, last).optimizer.schedule}
    assert getattr(other, first) == getattr(start, first)
    assert recipe(other) != recipe(start)


def test_a_sweep_is_reused_for_the_same_text_and_model_and_only_for_these(tmp_path: Path) -> None:
    base = base_config(tmp_path)
    trained: list[str] = []

    def train(config: RunConfig) -> float:
        trained.append(config.name)
        return abs(math.log(config.finetune.optimizer.lr / 4e-3)) + abs(
            math.log(config.finetune.optimizer.batch_tokens / 128)
        )

    def sweep(base: RunConfig, name: str = REFERENCE, tokens: int = 6000) -> int:
        before = len(trained)
        tuned = tune(base, name, ARMS[name], tmp_path / "slices", tokens, train)
        assert tuned.settings.lr == pytest.approx(4e-3)
        assert tuned.settings.batch_tokens == 128
        return len(trained) - before

    assert sweep(base) > 2
    assert sweep(base, "disco") > 2  # joint training has the submodels' rate, ours half: both must move
    other_run = base.model_copy(update={"name": "other", "seed": 7, "tags": {"who": "me"}})
    assert sweep(other_run) == 0
    assert sweep(base.model_copy(update={"model": base.model.model_copy(update={"family": "mixtral"})})) > 0
    assert sweep(base, tokens=7000) > 0
    assert (
        sweep(base.model_copy(update={"corpus": base.corpus.model_copy(update={"sources": base.corpus.sources[:2]})}))
        > 0
    )
    keys = {
        sweep_key(slice_config(each, "joint", ARMS["joint"], tmp_path, 6000), ARMS["joint"])
        for each in (base, other_run)
    }
    assert len(keys) == 1
    # Batches below a sequence are not possible: they are passed over, not an error.
    assert all("batch-32-" not in name for name in trained)


def test_what_only_a_short_training_prefers_is_not_taken(tmp_path: Path) -> None:
    base = base_config(tmp_path)

    def train(config: RunConfig) -> float:
        # because the best batch size grows with the tokens
        best = 128 if config.tokens.total < base.tokens.total else 256
        return abs(math.log(config.finetune.optimizer.batch_tokens / best))

    tuned = tune(base, REFERENCE, ARMS[REFERENCE], tmp_path / "slices", 6000, train)
    assert (tuned.settings.batch_tokens, tuned.settings.lr) == (256, base.submodels.optimizer.lr)
    assert stored_result(base, REFERENCE, ARMS[REFERENCE], tmp_path / "slices", 6000) == tuned
    assert stored_result(base, REFERENCE, ARMS[REFERENCE], tmp_path / "slices", 7000) is None


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_joint_training_is_tuned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_config(tmp_path, lr=2e-4)  # a tenth of the rate that such a model allows
    monkeypatch.setattr("benchmarks.study.compare.tuning.MOST_TRAININGS", 3)
    result = compare(
        base, tmp_path / "tuned", ["upcycle"], budgets=("tokens",), backend=LocalBackend(), slice_tokens=4000
    )
    for row in result.rows:
        assert row.tuned is not None
        assert (row.tuned.trainings, row.tuned.slice_tokens) == (3, 4000)
        assert row.recipe["finetune.optimizer.lr"] == row.tuned.lr
    assert not (tmp_path / "tuned" / "slices").exists()
    console = Console(width=200, record=True)
    console.print(compare_view(result))
    assert "trainings of 4,000 tokens each, on the validation documents" in " ".join(console.export_text().split())
    # The next comparison of the same text and model trains no slice.
    runs: list[str] = []
    real = comparison.pipeline.run
    monkeypatch.setattr(
        comparison.pipeline,
        "run",
        lambda config, *rest, **named: runs.append(config.name) or real(config, *rest, **named),
    )
    again = compare(
        base, tmp_path / "again", [REFERENCE], budgets=("tokens",), backend=LocalBackend(), slice_tokens=4000
    )
    assert runs == ["joint-tokens"]
    assert again.rows[0].tuned == result.rows[0].tuned


def test_a_setting_that_diverges_is_passed_over_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_config(tmp_path)
    tried: list[float] = []

    def run(config: RunConfig, views: Any, *, backend: Any, ways: Any) -> Path:
        tried.append(config.finetune.optimizer.lr)
        if config.finetune.optimizer.lr > 2e-3:
            raise NotFiniteError("finetune: the loss of step 3 is nan", 3)
        if config.finetune.optimizer.lr < 2e-3:
            raise TrainingError("a machine that kept dying")
        (config.directory / "evaluation").mkdir(parents=True)
        write_json(config.directory / "evaluation" / "evaluation.json", {"loss": 5.0})
        return config.directory

    monkeypatch.setattr(comparison.pipeline, "run", run)
    monkeypatch.setattr(comparison, "share_corpus", lambda *_: None)
    with pytest.raises(TrainingError, match="kept dying"):  # independent of the settings: the same command continues
        compare(base, tmp_path / "compared", [REFERENCE], budgets=("tokens",), slice_tokens=4000)
    assert tried == [2e-3, 4e-3, 1e-3]
    with pytest.raises(TrainingError, match="kept dying"):
        compare(base, tmp_path / "compared", [REFERENCE], budgets=("tokens",), slice_tokens=4000)
    assert tried == [2e-3, 4e-3, 1e-3, 1e-3]
