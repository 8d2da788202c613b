"""What a run computes does not change: clusters, weights and losses of tiny runs of four families are those on record.

Before (af276e38): on an AMD EPYC, `assert len(found["losses"][unit]) == len(losses)` failed for qwen3_moe. The record
came from an Intel processor, on which other documents were in a cluster, so that its sub-model made another number of
steps.
"""

import os
import subprocess
import sys

import pinned_runs
import pytest
import torch

from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("family", pinned_runs.RUNS)
def test_a_run_gives_the_results_on_record(tmp_path, family):
    directory = pipeline.run(pinned_runs.config_of(family, tmp_path), backend=LocalBackend())
    pinned_runs.compare(family, pinned_runs.results(directory))


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("family", pinned_runs.RUNS)
def test_training_from_given_clusters_gives_the_results_on_record(tmp_path, family):
    pinned_runs.compare(family, pinned_runs.train_given_clusters(family, tmp_path), "given")


@pytest.mark.parametrize(
    ("instructions", "openblas", "families"),
    [
        pytest.param("default", "Prescott", ["qwen3_moe"], id="SSE"),
        pytest.param("default", "Prescott", list(pinned_runs.RUNS), id="SSE-all", marks=pytest.mark.slow),
        pytest.param("avx2", "Haswell", list(pinned_runs.RUNS), id="AVX2-all", marks=pytest.mark.slow),
    ],
)
def test_a_processor_with_other_instructions_gives_the_results_on_record(instructions, openblas, families):
    processor = {"ATEN_CPU_CAPABILITY": instructions, "OPENBLAS_CORETYPE": openblas}
    done = subprocess.run(
        [sys.executable, pinned_runs.__file__, *families],
        env=os.environ | processor,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
