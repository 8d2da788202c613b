"""Tiny jobs, and jobs whose inputs end their workers early; nothing in the workers is replaced."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch

from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.models import hf_config, save_model, skeleton
from moedisco_ray.packed_tokens import TokenStream, batch_indices, write_packed
from moedisco_ray.policies import hanging
from moedisco_ray.training import TrainJob, TrainResult, World, train

VOCABULARY, LENGTH, BATCH = 64, 16, 4
BROKEN = VOCABULARY - 1
"""A token whose embedding is not a number; no text holds it, but where `spoil` puts it."""
UNKNOWN = VOCABULARY
"""A token that the model has no embedding of, which is an error of its own."""


def make_job(directory: Path, steps: int, kind: type[TrainJob] = TrainJob, micro_batch: int | None = None) -> TrainJob:
    """A tiny dense model on random tokens; it sees no sequence twice."""
    sizes = Architecture(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe_intermediate_size=24,
        num_experts=1,
        num_experts_per_tok=1,
    )
    config = hf_config("qwen3_moe", sizes, VOCABULARY, LENGTH, 0)
    torch.manual_seed(0)
    model = type(skeleton(config))(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[BROKEN] = float("nan")
    save_model(model, directory / "model")
    tokens = np.random.default_rng(0).integers(1, BROKEN, 2 * steps * BATCH * LENGTH)
    write_packed(directory / "shards", [[tokens]], 0, VOCABULARY)
    return kind(
        stage="submodels",
        name="submodel-0",
        model=directory / "model",
        packed_dirs=(directory / "shards",),
        output=directory / "trained",
        checkpoints=directory / "checkpoints" / "steps",
        steps=steps,
        sequence_length=LENGTH,
        optimizer=Optimizer(lr=1e-3, batch_tokens=BATCH * LENGTH, micro_batch=micro_batch),
        checkpoint_every=5,
        log_every=1,
    )


def here(job: TrainJob) -> TrainResult:
    """Train in this process, undisturbed."""
    torch.set_num_threads(1)
    return train(job, World(), _ignore, lambda: False)


def spoil(job: TrainJob, step: int, token: int = BROKEN) -> None:
    """Put the broken token, or another, into one sequence of a step's batch, the step counted from 0."""
    stream = TokenStream(job.packed_dirs, LENGTH)
    window = int(batch_indices(job.seed, step, job.batch, len(stream))[0])
    part = np.load(job.packed_dirs[0] / "part-00000.npy")
    part[window * LENGTH + LENGTH // 2] = token
    np.save(job.packed_dirs[0] / "part-00000.npy", part)


@dataclasses.dataclass(frozen=True)
class OnASmallDevice(TrainJob):
    """Once it has a checkpoint, there is no room for more than two sequences at a time."""

    @property
    def step_tokens(self) -> int:
        """What every forward pass asks for."""
        if (self.optimizer.micro_batch or self.batch) > 2 and any(Path(self.checkpoints).glob("step-*")):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().step_tokens


HUNG_SECONDS = 12.0
"""Minimum seconds that a step of `HangsOnce` gets, in place of `hanging.LEAST_SECONDS`."""


@dataclasses.dataclass(frozen=True)
class HangsOnce(TrainJob):
    """Once it has a checkpoint, a step never ends, and gets less time than usual; in the next process it does end."""

    @property
    def step_tokens(self) -> int:
        """What every step asks for."""
        marker = self.output.parent / "has-hung"
        in_step = sys._getframe(1).f_globals["__name__"].endswith("stepper")  # and not when it logs, which has no limit
        if in_step and any(Path(self.checkpoints).glob("step-*")) and not marker.exists():
            marker.touch()
            hanging.LEAST_SECONDS = HUNG_SECONDS
            time.sleep(3600)
        return super().step_tokens


def _ignore(event: Event) -> None:
    pass
