"""What a run computes does not change: weights and losses of four tiny runs are those on record."""

import json

import pinned_runs
import pytest
import torch

from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", [
    pytest.param(family, marks=[] if family == "qwen3_moe" else [pytest.mark.slow]) for family in pinned_runs.RUNS])
def test_a_run_gives_the_results_on_record(tmp_path, family):
    pinned = json.loads(pinned_runs.FILE.read_text())
    found = pinned_runs.results(pipeline.run(pinned_runs.config_of(family, tmp_path), backend=LocalBackend()))
    pinned_runs.same(found, pinned["runs"][family], to_the_bit=pinned["surroundings"] == pinned_runs.surroundings())
