"""Choose the settings with which training fits a card, at the least cost.

Settings without a value of the user's (`auto` or null) are free, and the micro-batch may always be smaller. Each change
has a cost: a factor on the time until the same loss. Factors multiply, and the cheapest combination that fits is
chosen. If the settings fit as they are, nothing changes.

The workers of a gang may wait for each other's data for longer than they compute. A step then takes as long as its
exchanges: more than once per step, if there are several micro-batches and no memory to keep what was exchanged.

| change | factor | reason |
|---|---|---|
| smaller `micro_batch` | 1 | the same operations, in smaller parts |
| `moments: fp8` | 1.1 | assumed: 4 significant bits; 8-bit Adam reaches the loss of fp32 (arXiv 2110.02861) |
| `gradient_checkpointing` | 4/3 | the forward pass runs twice: four passes instead of three |
| `precision: pure_bf16` | 1.4 | assumed: weights of 8 significant bits, rounded at random |
| `offload_moments` | computed | a step moves all moments to the card and back at 25 GB/s, computing nothing meanwhile |
| `block_steps` | 3 | assumed: a step trains a fraction of the weights, but takes less time (arXiv 2404.02827) |
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.config.run import divisors
from moedisco_ray.plan.memory import Memory, micro_batch_sequences, worker_sequences

BLOCK_STEPS = 100
"""Steps for which a block trains; BAdam's authors use 50 to 100."""
FP8_COST = 1.1
RECOMPUTATION_COST = 4 / 3
BF16_COST = 1.4
BLOCKS_COST = 3.0
OFFLOAD_BYTES_PER_SECOND = 25e9
"""Assumed speed of copies between a card and the machine's memory (bytes/s): PCIe 4.0 with 16 lanes."""
CHANGEABLE = ("micro_batch", "gradient_checkpointing", "precision", "moments", "offload_moments", "block_steps")
"""Settings of the optimizer that a plan may change."""


class Choice(BaseModel, frozen=True, defer_build=True):
    """Settings that a run uses instead of those in its configuration, because the model does not fit with these."""

    optimizer: Optimizer
    """The optimizer's settings, complete."""
    settings: tuple[str, ...]
    """The changed ones, as arguments of `--set`."""
    cost: float
    """Factor on the time until the same loss, relative to the settings in the configuration."""

    def __str__(self) -> str:
        names = ", ".join(setting.rpartition("optimizer.")[2] for setting in self.settings)
        return f"{names} (about {self.cost:.1f} times the time)" if self.cost > 1 else names


@dataclasses.dataclass(frozen=True)
class Exchanging:
    """Time that the workers of a gang exchange weights and gradients in one step (s), by their settings.

    Attributes:
        in_step: With the memory that the workers have.
        with_room: With as much memory as they would need to exchange once per step.
    """

    in_step: Callable[[Optimizer], float]
    with_room: Callable[[Optimizer], float]


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a training has to fit.

    Attributes:
        sequence_length: Tokens per sequence.
        pool_gb: Memory of a worker of the pool (GiB).
        host_gb: Main memory that a worker may fill (GiB); None if unknown.
        workers: Workers that share the model.
        alone: Whether all weights are trained and always on one worker, which offloading and blocks need.
    """

    sequence_length: int
    pool_gb: float
    host_gb: float | None
    workers: int
    alone: bool

    def trials(self, optimizer: Optimizer) -> Iterator[Optimizer]:
        """All values of the settings that the configuration leaves open."""
        return combinations(optimizer, self.sequence_length, self.workers, alone=self.alone)


def choose(
    measure: Callable[[Optimizer], Memory],
    optimizer: Optimizer,
    room: Room,
    *,
    section: str,
    step_seconds: float,
    exchange: Exchanging | None = None,
) -> Choice | None:
    """The cheapest settings that fit; None if none do.

    Args:
        measure: Memory of a worker.
        optimizer: The settings in the configuration.
        room: Where they have to fit.
        section: Dotted path of the optimizer's section.
        step_seconds: Time of a step without recomputation (s).
        exchange: Time that a gang's exchanges take in a step; None for a single worker.
    """
    for cost, trial in by_cost(measure, room.trials(optimizer), step_seconds, exchange):
        if measure(trial).fits(room.pool_gb, room.host_gb):
            return Choice(
                optimizer=trial,
                settings=changes(optimizer, trial, section),
                cost=cost / _cost(optimizer, measure, step_seconds, None if exchange is None else exchange.with_room),
            )
    return None


def least_memory(measure: Callable[[Optimizer], Memory], optimizer: Optimizer, room: Room) -> Memory:
    """The memory of those settings that lack least where none fit, of the settings that `choose` tries.

    Where they lack the host's memory, the card's decides.
    """
    return min(
        map(measure, room.trials(optimizer)),
        key=lambda memory: (memory.excess(room.pool_gb, room.host_gb), memory.total),
    )


def combinations(
    optimizer: Optimizer, sequence_length: int, workers: int, *, alone: bool, everything: bool = False
) -> Iterator[Optimizer]:
    """All values of the free settings; a larger micro-batch comes first.

    Args:
        optimizer: The settings in the configuration.
        sequence_length: Tokens per sequence.
        workers: Workers that share the model.
        alone: Whether all weights are trained and always on one worker.
        everything: Whether to change settings with a value of the user's too.
    """

    def options(name: str, free: Any, value: Any, *, possible: bool = True) -> tuple[Any, ...]:
        now = getattr(optimizer, name)
        return (now, value) if possible and (everything or now == free) and now != value else (now,)

    now = micro_batch_sequences(optimizer, sequence_length, workers)
    share = worker_sequences(optimizer, sequence_length, workers)
    # Try only sizes that divide the worker's share of the batch: others would leave a short micro-batch at the end of a
    # step.
    sizes = [optimizer.micro_batch, *(size for size in reversed(divisors(share)) if size < now)]
    adamw = optimizer.name == "adamw"
    free = (
        options("block_steps", None, BLOCK_STEPS, possible=alone and adamw),
        options("offload_moments", None, value=True, possible=alone and adamw),
        options("precision", "auto", "pure_bf16"),
        options("gradient_checkpointing", None, value=True),
        options("moments", "auto", "fp8", possible=adamw),
        sizes,
    )
    names = ("block_steps", "offload_moments", "precision", "gradient_checkpointing", "moments", "micro_batch")
    for values in itertools.product(*free):
        yield optimizer.model_copy(update=dict(zip(names, values, strict=True)))


def changes(now: Optimizer, then: Optimizer, section: str) -> tuple[str, ...]:
    """Settings that differ, as arguments of `--set`."""
    changed: dict[str, Any] = {
        name: getattr(then, name) for name in CHANGEABLE if getattr(then, name) != getattr(now, name)
    }
    return tuple(f"{section}.{name}={str(value).lower()}" for name, value in changed.items())


def copy_seconds(memory: Memory) -> float:
    """Time in each step to copy offloaded moments to the card and back (s)."""
    return 2 * memory.offloaded / OFFLOAD_BYTES_PER_SECOND


def time_factor(optimizer: Optimizer, memory: Memory | None, step_seconds: float) -> float:
    """Time of a step as a multiple of one without recomputation and offloaded moments.

    Args:
        optimizer: Settings of the step.
        memory: Memory of a worker; None: nothing is offloaded.
        step_seconds: Time of a step without recomputation (s).
    """
    recomputing = RECOMPUTATION_COST if optimizer.gradient_checkpointing else 1.0
    return recomputing + (0.0 if memory is None else copy_seconds(memory) / step_seconds)


def by_cost(
    measure: Callable[[Optimizer], Memory],
    trials: Iterator[Optimizer],
    step_seconds: float,
    exchange: Exchanging | None = None,
) -> list[tuple[float, Optimizer]]:
    """Settings with their cost, ascending.

    Args:
        measure: Memory of a worker.
        trials: The settings.
        step_seconds: Time of a step without recomputation (s).
        exchange: Time that a gang's exchanges take in a step; None for a single worker.
    """
    seconds = None if exchange is None else exchange.in_step
    return sorted(((_cost(trial, measure, step_seconds, seconds), trial) for trial in trials), key=lambda each: each[0])


def _cost(
    trial: Optimizer,
    measure: Callable[[Optimizer], Memory],
    step_seconds: float,
    exchange_seconds: Callable[[Optimizer], float] | None,
) -> float:
    cost = BLOCKS_COST if trial.block_steps else 1.0
    waiting = 0.0 if exchange_seconds is None else exchange_seconds(trial) / step_seconds
    cost *= max(waiting, time_factor(trial, measure(trial) if trial.offload_moments else None, step_seconds))
    cost *= BF16_COST if trial.precision == "pure_bf16" else 1.0
    return cost * (FP8_COST if trial.moments == "fp8" else 1.0)
