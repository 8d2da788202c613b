"""How often workers of a sharded training exchange weights and gradients: bytes per step, counted in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import L, write_tiny
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from moedisco_ray.core.config import Optimizer
from moedisco_ray.plan.memory import Exchange, Memory, exchange_of
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.stepper import ResidentStepper

WORKERS = 8


class Traffic(TorchDispatchMode):
    """Counts the bytes of weights that are gathered and of gradients that are reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if "allgather_base" in name:
            self.gathered += args[0].nbytes
        elif "reduce_scatter_base" in name:
            self.reduced += args[1].nbytes
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, in the process of rank 0 of eight workers; collective operations leave its tensors as they are."""
    directory = tmp_path_factory.mktemp("moe")
    write_tiny(directory, 8)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORKERS)
    yield directory
    dist.destroy_process_group()


def traffic(directory: Path, exchange: Exchange, micro_batches: int) -> Traffic:
    """Traffic of the second of two steps."""
    recipe = Optimizer(batch_tokens=WORKERS * 4 * L, micro_batch=4 // micro_batches)
    job = TrainJob(
        stage="finetune",
        name="fake",
        model=directory,
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=2,
        sequence_length=L,
        optimizer=recipe,
        checkpoint_every=None,
        exchange=exchange,
    )
    world = World(0, WORKERS)
    step = ResidentStepper(trainable(directory, recipe, world, exchange=exchange), job, world)
    tokens = torch.ones(4, L, dtype=torch.long)
    batch = [MicroBatch(part, part, job.step_tokens, None) for part in tokens.split(4 // micro_batches)]
    step(batch)
    with Traffic() as counted:
        step(batch)
    return counted


def test_four_micro_batches_move_no_more_bytes_than_one(model: Path) -> None:
    one, four = (traffic(model, "step", count) for count in (1, 4))
    assert one.gathered > 0
    assert one.reduced > 0
    assert four.gathered <= 1.3 * one.gathered
    assert four.reduced <= 1.3 * one.reduced


def test_exchanging_for_every_micro_batch_multiplies_the_traffic(model: Path) -> None:
    once, one, four = (
        traffic(model, exchange, count) for exchange, count in (("step", 1), ("micro_batch", 1), ("micro_batch", 4))
    )
    assert four.reduced == 4 * one.reduced == 4 * once.reduced
    assert four.gathered == 4 * one.gathered
    assert one.gathered > 1.5 * once.gathered  # again in the backward pass


@pytest.mark.parametrize(("room", "expected"), [(3.0, "step"), (1.0, "micro_batch")])
def test_workers_exchange_once_per_step_if_that_fits(room: float, expected: Exchange) -> None:
    def measure(exchange: Exchange) -> Memory:
        copies = 2**31 if exchange == "step" else 2**29
        return Memory(
            weights=0, gradients=0, optimizer=0, activations=0, compute_copies=copies, optimizer_step=0, overhead=0
        )

    assert exchange_of(measure, room) == expected
