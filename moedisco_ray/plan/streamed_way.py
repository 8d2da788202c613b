"""Streamed training of a model on cards of one machine: hours, card and host memory, whatever the pool's setting.

The speed of copies follows from the generation of the card's PCIe slot, and that from its compute capability: with 16
lanes, copies from pinned memory reach about 80 % of the slot's speed in one direction, and less in each of two. The
speed of the host's memory, which its cards share, is assumed: 70 % of eight channels of DDR4-3200.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moedisco_ray.core.config import AnyPool, Architecture, Lora, Optimizer, Pool, Residence, read_architecture
from moedisco_ray.core.families import FamilyName
from moedisco_ray.plan.cost import flops_per_token, optimizer_flops_per_token
from moedisco_ray.plan.memory import Exchange, Memory, micro_batch_sequences, worker_memory, worker_sequences
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.plan.streamed_memory import streamed_memory
from moedisco_ray.plan.streaming import Host, StepTime, step_time, step_work
from moedisco_ray.policies.parallel import Layout

_PCIE = (((9, 0), 50e9, 40e9), ((8, 0), 25e9, 20e9), ((0, 0), 12e9, 10e9))
"""Lowest compute capability, speed of copies in one direction, and of each while both are used (bytes/s)."""
_UNKNOWN_CARD = (8, 0)
"""Compute capability that is assumed of a card without a name."""
_PER_CARD = 2
"""Least number of micro-batches of a step for each of several cards, where the batch has as many sequences."""
_MEMORY_SPEED = 140e9
"""Assumed speed of a host's memory (bytes/s)."""


def on_cards(optimizer: Optimizer, pool: AnyPool, sequence_length: int) -> Optimizer:
    """Settings with which all cards of a pool that streams have work: at least two micro-batches of a step for each.

    With fewer, cards would wait for one another: a micro-batch is in one layer at a time.
    """
    if pool.memory == "resident" or pool.most_workers == 1:
        return optimizer
    most = max(1, worker_sequences(optimizer, sequence_length, 1) // (_PER_CARD * pool.most_workers))
    has_enough = micro_batch_sequences(optimizer, sequence_length, 1) <= most
    return optimizer if has_enough else optimizer.model_copy(update={"micro_batch": most})


def streamed_step(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    pool: Pool,
    *,
    sequence_length: int,
    cards: int = 1,
) -> StepTime:
    """The time of a step on some cards of one machine of a pool, with the arithmetic of Muon."""
    work = step_work(family, architecture, vocab_size, optimizer, sequence_length=sequence_length, gpu=pool.gpu)
    muon = optimizer_flops_per_token(family, architecture, optimizer, pool) * optimizer.batch_tokens
    work = dataclasses.replace(work, update_flops=muon)  # at the speed of the model, as all other operations
    return step_time(work, pool.flops(architecture.num_experts), _host(pool, cards), cards=cards, division="layers")


def streamed_flops(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    pool: Pool,
    *,
    sequence_length: int,
    cards: int = 1,
) -> float:
    """Operations per token, those of the optimizer included, raised to what all cards could do in a step's time."""
    parameters = count_parameters(family, architecture, vocab_size)
    flops = flops_per_token(parameters, architecture, sequence_length, checkpointing=True)
    if not pool.gpu:  # nothing is copied over a slot
        return flops
    step = streamed_step(
        family, architecture, vocab_size, optimizer, pool, sequence_length=sequence_length, cards=cards
    )
    return (flops + optimizer_flops_per_token(family, architecture, optimizer, pool)) / step.kept


def training_memory(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    *,
    residence: Residence,
    sequence_length: int,
    gpu: int,
    workers: int = 1,
    cards: int = 1,
    exchange: Exchange = "micro_batch",
    layout: Layout | None = None,
    lora: Lora | None = None,
) -> Memory:
    """Peak memory of one worker, with its weights on the card or in the host's memory; see `worker_memory`.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        vocab_size: Rows of the embedding.
        optimizer: Precision, micro-batch and gradient checkpointing.
        residence: Where the weights are; several workers have them on their cards.
        sequence_length: Tokens per sequence.
        gpu: GPUs per worker.
        workers: Number of workers.
        cards: Number of cards that one worker streams to.
        exchange: How often they exchange weights and gradients.
        layout: How they share the model; None: all weights are sharded among all of them.
        lora: Adapters that one worker trains instead of the weights.
    """
    if residence == "streamed" and workers == 1:
        return streamed_memory(
            family,
            architecture,
            vocab_size,
            optimizer,
            sequence_length=sequence_length,
            gpu=gpu,
            cards=cards,
            lora=lora,
        )
    return worker_memory(
        family,
        architecture,
        vocab_size,
        optimizer,
        sequence_length=sequence_length,
        gpu=gpu,
        workers=workers,
        exchange=exchange,
        layout=layout,
        lora=lora,
    )


def model_memory(
    residence: Residence,
    directory: Path,
    family: FamilyName,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
    workers: int = 1,
    cards: int = 1,
    exchange: Exchange = "micro_batch",
    layout: Layout | None = None,
    lora: Lora | None = None,
) -> Memory:
    """`training_memory` of the model in a Hugging Face directory.

    Raises:
        CheckpointError: The directory holds no model of the family.
    """
    architecture = read_architecture(directory, family)
    return training_memory(
        family,
        architecture,
        architecture.vocab_size or 0,
        optimizer,
        residence=residence,
        sequence_length=sequence_length,
        gpu=gpu,
        workers=workers,
        cards=cards,
        exchange=exchange,
        layout=layout,
        lora=lora,
    )


def _host(pool: Pool, cards: int) -> Host:
    card = pool.gpu_card
    capability = _UNKNOWN_CARD if card is None else card.capability
    alone, both = next((alone, both) for least, alone, both in _PCIE if capability >= least)
    return Host(alone, both, all_cards=2 * both * cards, memory_speed=_MEMORY_SPEED, memory_gb=float("inf"))
