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
from damaged_runs import pinned_run

from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

STREAMED = {"memory": "streamed"}


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("family", pinned_runs.RUNS)
def test_a_run_gives_the_results_on_record(tmp_path, family):
    if family == "qwen3_moe":  # other tests need this run, too
        with pinned_run() as made:
            directory = made.copy
    else:
        directory = pipeline.run(pinned_runs.config_of(family, tmp_path), backend=LocalBackend())
    pinned_runs.compare(family, pinned_runs.results(directory))


@pytest.mark.usefixtures("_one_thread")
def test_a_run_with_its_weights_in_the_host_s_memory_gives_the_results_on_record(tmp_path):
    """Seed, sub-models that synchronise, and fine-tune train through the same loop."""
    config = pinned_runs.config_of("qwen3_moe", tmp_path)
    pools = {name: getattr(config.pools, name).model_copy(update=STREAMED) for name in ("low_memory", "high_memory")}
    streamed = config.model_copy(update={"pools": config.pools.model_copy(update=pools)})
    directory = pipeline.run(streamed, backend=LocalBackend())
    pinned_runs.compare("qwen3_moe", pinned_runs.results(directory))


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("family", pinned_runs.RUNS)
def test_training_from_given_clusters_gives_the_results_on_record(tmp_path, family):
    pinned_runs.compare(family, pinned_runs.train_given_clusters(family, tmp_path), "given")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("instructions", "openblas"),
    [pytest.param("default", "Prescott", id="SSE"), pytest.param("avx2", "Haswell", id="AVX2")],
)
@pytest.mark.parametrize("family", pinned_runs.RUNS)
def test_a_processor_with_other_instructions_gives_the_results_on_record(instructions, openblas, family):
    processor = {"ATEN_CPU_CAPABILITY": instructions, "OPENBLAS_CORETYPE": openblas}
    done = subprocess.run(
        [sys.executable, pinned_runs.__file__, family],
        env=os.environ | processor,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
