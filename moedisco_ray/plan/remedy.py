"""The cheapest settings with which a stage fits its pool."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.config import Optimizer
from moedisco_ray.plan.memory import GIB, Memory, micro_batch_sequences, worker_sequences


class Remedy(BaseModel):
    """Settings to change, as arguments of `--set`.

    If no settings fit, `settings` are those that need the least memory, and `memory_gb` is the memory that a worker would need.
    """

    model_config = ConfigDict(frozen=True)

    fits: bool
    settings: tuple[str, ...]
    memory_gb: float

    def __str__(self) -> str:
        settings = " ".join(f"--set {setting}" for setting in self.settings)
        if self.fits:
            return f"fits with {settings}"
        least = f", even with {settings}" if settings else ""
        return f"no setting makes it fit; a worker would need {math.ceil(self.memory_gb)} GB{least}"


@dataclasses.dataclass(frozen=True)
class Spread:
    """A setting that divides a model among more workers, with its current value `now` and larger values to try, ascending."""

    setting: str
    now: int
    more: tuple[int, ...]


def find_remedy(
    measure: Callable[[Optimizer, int], Memory], optimizer: Optimizer, spread: Spread, *, section: str,
    sequence_length: int, pool_gb: float, sharded: bool,
) -> Remedy:
    """Try settings in the order of their cost, and return the first that fit.

    Settings are tried in this order: a smaller micro-batch (no cost), recomputed activations (a third more time), pure bf16 (a
    little precision), and finally more workers, or more and smaller sub-models.

    Args:
        measure: Function that returns the memory of a worker for optimizer settings and a value of the spread's setting.
        optimizer: The current optimizer settings.
        spread: The setting that divides the model further.
        section: Dotted path of the optimizer's section in the configuration.
        sequence_length: Tokens per sequence.
        pool_gb: Memory of a worker of the pool (GB).
        sharded: Whether the spread also divides the batch of a step, as sharded training does.
    """
    tried: list[tuple[int, tuple[str, ...]]] = []
    for wider in (spread.now, *spread.more):
        for trial in _trials(optimizer, sequence_length, wider if sharded else 1):
            total = measure(trial, wider).total
            widened = (f"{spread.setting}={wider}",) if wider != spread.now else ()
            tried.append((total, _settings(optimizer, trial, section) + widened))
            if total <= pool_gb * GIB:
                return Remedy(fits=True, settings=tried[-1][1], memory_gb=total / GIB)
    total, settings = min(tried, key=lambda attempt: attempt[0])
    return Remedy(fits=False, settings=settings, memory_gb=total / GIB)


def _trials(optimizer: Optimizer, sequence_length: int, workers: int) -> Iterator[Optimizer]:
    now = micro_batch_sequences(optimizer, sequence_length, workers)
    share = worker_sequences(optimizer, sequence_length, workers)
    # Try only sizes that divide the worker's share of the batch: others would leave a short micro-batch at the end of a step.
    smaller = [size for size in range(now - 1, 0, -1) if share % size == 0]
    precisions = dict.fromkeys((optimizer.precision, "pure_bf16"))
    recompute = dict.fromkeys((optimizer.gradient_checkpointing, True))
    for precision, checkpointing, micro_batch in itertools.product(precisions, recompute, (optimizer.micro_batch, *smaller)):
        yield optimizer.model_copy(
            update={"precision": precision, "gradient_checkpointing": checkpointing, "micro_batch": micro_batch})


def _settings(now: Optimizer, then: Optimizer, section: str) -> tuple[str, ...]:
    changed: dict[str, Any] = {
        name: getattr(then, name) for name in ("micro_batch", "gradient_checkpointing", "precision")
        if getattr(then, name) != getattr(now, name)}
    return tuple(f"{section}.{name}={str(value).lower()}" for name, value in changed.items())
