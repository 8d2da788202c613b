"""A training of a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.store.locations import Location
from moedisco_ray.models import hf_config, open_checkpoint, save_model, skeleton
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.training import TrainJob

L, V, BATCH = 16, 64, 2


def write_inputs(home: Path) -> None:
    """A MoE of two layers, and text in which there is something to learn."""
    torch.set_num_threads(1)
    rng = np.random.Generator(np.random.Philox(key=[1, 2]))
    write_packed(home / "shard", [[np.cumsum(rng.integers(0, 3, size=80)) % (V - 1) + 1 for _ in range(20)]], 0, V)
    sizes = Architecture(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
    )
    config = hf_config("qwen3_moe", sizes, V, L, 0)
    torch.manual_seed(0)
    save_model(type(skeleton(config))(config), home / "moe")


def small_job(
    home: Path, output: Path, checkpoints: Location, *, steps: int = 6, every: int | None = 2, keep: int = 2
) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="finetune",
        model=home / "moe",
        packed_dirs=(home / "shard",),
        output=output,
        checkpoints=checkpoints,
        steps=steps,
        sequence_length=L,
        optimizer=Optimizer(lr=3e-3, batch_tokens=BATCH * L),
        checkpoint_every=every,
        keep=keep,
        seed=5,
        load_balance=0.02,
        log_every=1,
    )


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(job.output))
