"""The quick check, which CI runs: what counts as a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.study.__main__ import app
from benchmarks.study.compare.arms import ARMS, arm_config
from benchmarks.study.grid import quick
from benchmarks.study.grid.cells import base_config


@pytest.mark.parametrize(
    ("gap", "code"), [(-0.1, 0), (quick.LARGEST_GAP, 0), (quick.LARGEST_GAP + 1e-3, 1), (1.0, 1), (float("nan"), 1)]
)
def test_a_default_that_is_far_behind_joint_training_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gap: float, code: int
) -> None:
    asked = []
    monkeypatch.setattr(quick, "gap", lambda work: asked.append(work) or gap)
    result = CliRunner().invoke(app, ["quick", "--work", str(tmp_path)])
    assert (result.exit_code, asked) == (code, [tmp_path])
    assert f"{gap:+.3f} nats per token, at most +0.050 is allowed" in result.output


def test_it_checks_the_default_preset_where_an_eighth_of_the_experts_is_active(tmp_path: Path) -> None:
    config = arm_config(
        base_config(quick.CELL, 0, None, tmp_path), "disco", ARMS["disco"], tmp_path, "tokens", quick.TOKENS
    )
    assert (config.tokens.total, quick.CELL.active_share, config.cluster_count) == (quick.TOKENS, 0.125, 2)
    for each in (config.submodels.optimizer, config.finetune.optimizer):
        assert (each.name, each.schedule) == ("muon", "run_cosine")
