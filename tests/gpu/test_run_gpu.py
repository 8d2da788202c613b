"""A whole small run with all its work on one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import small_config

from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
POOLS = {"low_memory": {"gpu": 1, "max_workers": 2}, "high_memory": {"gpu": 1, "workers": 1}}


def perplexities(run: Path) -> dict[str, float]:
    stages = read_json(run / "evaluation" / "evaluation.json")["stages"]
    return {stage: found["perplexity"] for stage, found in stages.items()}


def test_a_run_on_a_gpu_reaches_what_a_run_on_the_cpu_reaches(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    run = pipeline.run(small_config(tmp_path / "gpu", pools=POOLS), backend=LocalBackend())
    assert torch.cuda.max_memory_allocated() > 0
    assert all(read_manifest(run / stage.directory) for stage in STAGES)
    expected = perplexities(pipeline.run(small_config(tmp_path / "cpu"), backend=LocalBackend()))
    assert perplexities(run) == pytest.approx(expected, rel=0.1)
    assert perplexities(run)["finetune"] < perplexities(run)["merge"]
