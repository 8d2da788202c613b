"""An interrupted and resumed training of a small model, compared with an uninterrupted one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moedisco_ray.core.config import Architecture, FamilyName, Optimizer
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.records.events import discard
from moedisco_ray.models import config_values, hf_config, open_checkpoint, random_weights, same_bits, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.loop import train

STEPS = 8
LARGEST_DIFFERENCE = 0.01
"""Largest relative difference between losses on a GPU, whose kernels may add up in another order each time."""
_LENGTH, _SEQUENCES, _VOCABULARY = 64, 4, 256
_EXPERTS = 4


@dataclasses.dataclass(frozen=True)
class Resumed:
    """How an interrupted training compares with an uninterrupted one.

    Attributes:
        restored_step: Step from which it resumed.
        same: Whether all weights are equal bit for bit.
        difference: Largest relative difference between losses.
    """

    restored_step: int
    same: bool
    difference: float


def try_resuming(family: FamilyName, optimizer: Optimizer, device: str, folder: Path) -> Resumed:
    """Make 4 steps, a checkpoint and 4 more steps, and compare them with 8 steps.

    Args:
        family: Family of the model.
        optimizer: Settings of the training; its batch is replaced by a small one.
        device: torch's name of the device.
        folder: Empty folder for the model and the checkpoints.
    """
    job = _job(family, optimizer, folder)
    world = World(device=device)
    whole = train(_in(job, folder / "whole"), world, discard, lambda: False)
    parts = _in(job, folder / "parts")
    train(parts, world, discard, _after(STEPS // 2))
    resumed = train(parts, world, discard, lambda: False)
    ours, theirs = (dict(open_checkpoint(folder / name / "model")) for name in ("whole", "parts"))
    return Resumed(
        restored_step=resumed.restored_step,
        same=ours.keys() == theirs.keys() and all(same_bits(ours[key], theirs[key]) for key in ours),
        difference=max(
            (abs(one - other) / abs(other) for one, other in zip(resumed.losses, whole.losses, strict=True)),
            default=math.inf,
        ),
    )


def _job(family: FamilyName, optimizer: Optimizer, folder: Path) -> TrainJob:
    declaration = DECLARATIONS[family]
    fields = {} if declaration.recurrence is None else {"full_attention_interval": 2}
    sizes = Architecture(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        moe_intermediate_size=64,
        num_experts=_EXPERTS,
        num_experts_per_tok=declaration.router.only_top_k or 2,
        fields=fields,
    )
    values = config_values(hf_config(family, sizes, _VOCABULARY, _LENGTH, 0))
    tensors = random_weights(values, 0)
    write_checkpoint(folder / "start", ((key, tensors[key]) for key in tensors), values)
    random = np.random.default_rng(0)
    documents = [np.cumsum(random.integers(0, 3, size=100)) % (_VOCABULARY - 1) + 1 for _ in range(40)]
    write_packed(folder / "tokens", [documents], 0, _VOCABULARY)
    recipe = optimizer.model_copy(
        update={"batch_tokens": _SEQUENCES * _LENGTH, "micro_batch": None, "compile": False, "warmup": 0.0}
    )
    return TrainJob(
        stage="finetune",
        name="resume",
        model=folder / "start",
        packed_dirs=(folder / "tokens",),
        output=folder,
        checkpoints=folder,
        steps=STEPS,
        sequence_length=_LENGTH,
        optimizer=recipe,
        checkpoint_every=STEPS // 2,
        load_balance=0.01,
        z_loss=0.001,
    )


def _in(job: TrainJob, folder: Path) -> TrainJob:
    folder.mkdir()
    return dataclasses.replace(job, output=folder / "model", checkpoints=folder / "steps")


def _after(steps: int) -> Callable[[], bool]:
    """A function that asks a training to stop after a number of steps."""
    left = iter(range(steps - 1, -1, -1))
    return lambda: next(left) <= 0
