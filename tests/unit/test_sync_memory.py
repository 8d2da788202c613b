"""Peak memory of a member's process on a CPU is the plan's, whose card has its memory in the host's there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import ctypes, json, sys
from pathlib import Path
import numpy as np
import torch
from benchmarks import true_sizes
from moedisco_ray.backend import Placement
from moedisco_ray.core.config import Architecture, LowMemoryPool, Optimizer, Outer, Submodels
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import config_values, hf_config, random_weights, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.plan.memory import worker_memory
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.plan.streamed_memory import streamed_memory
from moedisco_ray.plan.sync_memory import sync_memory
from moedisco_ray.training import SyncPlan, TrainJob

torch.set_num_threads(1)
true_sizes._LOOK_SECONDS = 0.002
home, residence, bits, length = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), 16
recipe = Optimizer(lr=1e-3, batch_tokens=2 * length, precision="fp32")

def run(name, hidden, vocabulary):
    place = home / name
    place.mkdir()
    sizes = Architecture(hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, num_experts=8,
                         num_experts_per_tok=2, moe_intermediate_size=hidden)
    config = config_values(hf_config("qwen3_moe", sizes, vocabulary, length, 0))
    write_checkpoint(place / "start", random_weights(config, 0).items(), config)
    write_packed(place / "shard", [[np.random.default_rng(0).integers(1, vocabulary, 2000)]], 0, vocabulary)
    sync = SyncPlan(place / "sync", (1, 2), Outer(lr=0.7, momentum=0.6), scope="all", ranges=2, bits=bits)
    job = TrainJob(
        stage="seed", name="seed-0", model=place / "start", packed_dirs=(place / "shard",),
        output=place / "out" / "trained", checkpoints=place / "steps", steps=2, sequence_length=length,
        optimizer=recipe, checkpoint_every=None, memory=residence, sync=sync, drop_checkpoints=True)
    ctypes.CDLL(None).malloc_trim(0)
    before = true_sizes.own_mb()
    with true_sizes.own_memory() as peak:
        LocalBackend().train_all([job], Placement(LowMemoryPool(), 1, 0), home, lambda event: None)
    return (peak[0] - before) * 2**20, sizes

run("small", 32, 64)    # loads what libraries load at first use
measured, sizes = run("large", 512, 8192)
parameters = count_parameters("qwen3_moe", sizes, 8192)
settings = Submodels(sync_every=1, sync_bits=bits)
syncs = sync_memory(settings, parameters, parameters.total, residence)
measure = streamed_memory if residence == "streamed" else worker_memory
memory = measure("qwen3_moe", sizes, 8192, recipe, sequence_length=length, gpu=0)
card = memory.total - memory.overhead
if residence == "streamed":     # the update and a sync are one after the other
    planned = memory.host + syncs.held + max(card, syncs.buffers)
else:                           # and a checkpoint's copy of weights and optimizer state
    planned = card + memory.weights + memory.optimizer + syncs.total
print(json.dumps([measured, planned]))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("residence", "bits"), [("resident", 4), ("streamed", 4), ("resident", None)])
def test_a_member_needs_the_memory_of_the_plan(tmp_path: Path, residence: str, bits: int | None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), residence, json.dumps(bits)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        # glibc otherwise learns to keep what was freed
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17), "OMP_NUM_THREADS": "1"},
    )
    measured, planned = json.loads(done.stdout.splitlines()[-1])
    assert measured == pytest.approx(planned, rel=0.1), f"{measured / 2**20:.0f} MiB of {planned / 2**20:.0f}"
