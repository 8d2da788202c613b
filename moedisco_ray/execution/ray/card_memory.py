"""The memory that a card really has for a training, and settings that fit it where it is less than configured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist

from moedisco_ray.core.config import FamilyName, Optimizer
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.models import read_config
from moedisco_ray.plan.fitting import changes
from moedisco_ray.plan.memory import FIXED_OVERHEAD, GIB, Memory
from moedisco_ray.plan.refit import within
from moedisco_ray.plan.streamed_way import model_memory
from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training import TrainJob, World


def fitted_to_card(job: TrainJob, world: World, emit: Emit) -> tuple[TrainJob, float]:
    """The job with settings that fit the card of this process, and those of the other workers of its gang.

    Other programs may hold a part of a card, and a card may have less than the configuration says. The job is returned
    as it is if it fits, and with a warning if no settings make it fit.

    Args:
        job: The training.
        world: The worker, whose device is a GPU.
        emit: Receives a warning that names the card, its memory and the changed settings.

    Returns:
        The job, and the memory of the smallest card (GiB).
    """
    job.store.fetch(job.model / "config.json")
    card_gb = _shared_minimum(min(map(available_gb, world.all_devices)), world)
    found = fitted(job, world, card_gb)
    if found is not job and world.rank == 0:
        settings = ", ".join(changes(job.optimizer, found.optimizer, "optimizer")) or "the settings as they are"
        message = (
            f"{job.name}: {torch.cuda.get_device_name(world.device)} has {card_gb:.1f} GiB for it, less than planned; "
            f"it trains with {settings}"
        )
        emit(Event("warning", job.stage, job.name, {"message": message}))
    return found, card_gb


def fitted(job: TrainJob, world: World, card_gb: float) -> TrainJob:
    """The job itself if it fits a card, else a copy with a smaller micro-batch, or recomputation if that is open.

    Args:
        job: The training.
        world: One of the workers that share it.
        card_gb: Memory of the smallest of their cards (GiB).
    """
    measure = memory_of(job, world.size, world.layout, cards=len(world.all_devices))
    if measure(job.optimizer).total <= card_gb * GIB:
        return job
    found = within(
        measure,
        job.optimizer,
        card_gb,
        sequence_length=job.sequence_length,
        workers=world.size,
        alone=False,
        has_state=True,
    )
    return dataclasses.replace(job, optimizer=found or job.optimizer)


def available_gb(device: str) -> float:
    """Memory of a card that this process may use (GiB): what is free, and what it holds itself."""
    free, total = torch.cuda.mem_get_info(device)
    return float(min(total, free + torch.cuda.memory_reserved(device) + FIXED_OVERHEAD)) / GIB


def _shared_minimum(value: float, world: World) -> float:
    if world.size == 1:
        return value
    least = torch.tensor([value], device=world.device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least.item())


def memory_of(
    job: TrainJob, workers: int, layout: Layout | None = None, *, cards: int = 1
) -> Callable[[Optimizer], Memory]:
    """A function that returns the planned memory of a worker on a GPU, by settings of the job's optimizer.

    Args:
        job: The training.
        workers: Number of workers that share it.
        layout: How they share the model; None: as on nodes of one card each.
        cards: Number of cards that a worker streams to.

    Raises:
        CheckpointError: The model of the job cannot be read.
    """
    family: FamilyName = read_config(job.model)["model_type"]
    if layout is None and job.sharing is not None and workers > 1:
        layout = job.sharing.layout(workers, 1)
    return functools.partial(_memory, job, family, layout, workers, cards=cards)


def _memory(
    job: TrainJob, family: FamilyName, layout: Layout | None, workers: int, optimizer: Optimizer, *, cards: int
) -> Memory:
    return model_memory(
        job.memory,
        job.model,
        family,
        optimizer,
        sequence_length=job.sequence_length,
        gpu=1,
        workers=workers,
        cards=cards,
        exchange=job.exchange,
        layout=layout,
        lora=job.lora,
    )
