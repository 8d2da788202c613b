"""The cheapest change of settings that makes a stage fit its pool."""

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
    """What to set, as `--set` takes it.

    Where no setting fits, `settings` is what needs least, and `memory_gb` is what each worker would have to offer.
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
    """The setting that makes one worker's part of a model smaller: its value now, and larger ones to try, ascending."""

    setting: str
    now: int
    more: tuple[int, ...]


def find_remedy(
    measure: Callable[[Optimizer, int], Memory], optimizer: Optimizer, spread: Spread, *, section: str,
    sequence_length: int, pool_gb: float, sharded: bool,
) -> Remedy:
    """Try settings in order of what they cost, each alone before it joins the cheaper ones; the first that fits is it.

    The order: a smaller micro-batch (free), recomputed activations (a third more time), pure bf16 (a little
    precision), then more workers, or more and smaller sub-models.

    Args:
        measure: Memory of a worker under an optimizer and a value of the spread.
        optimizer: The settings as they are.
        spread: What can be divided further.
        section: Dotted path of the optimizer.
        sequence_length: Tokens per sequence.
        pool_gb: What a worker of the pool offers.
        sharded: Whether the spread divides one step's batch too, as sharded training does.
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
    # Only a divisor of the share leaves no short micro-batch at a step's end.
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
