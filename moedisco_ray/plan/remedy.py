"""The cheapest settings with which a stage fits its pool."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

from pydantic import BaseModel

from moedisco_ray.core.config import Optimizer
from moedisco_ray.plan.fitting import by_cost, changes, combinations
from moedisco_ray.plan.memory import GIB, Memory


class Remedy(BaseModel, frozen=True, defer_build=True):
    """Settings to change, as arguments of `--set`.

    If no settings fit, `settings` are those that need the least memory, and `memory_gb` is the memory that a worker
    would need.
    """

    fits: bool
    settings: tuple[str, ...]
    memory_gb: float

    def __str__(self) -> str:
        settings = " ".join(f"--set {setting}" for setting in self.settings)
        if self.fits:
            return f"fits with {settings}"
        least = f", even with {settings}" if settings else ""
        return f"no setting makes it fit; a worker would need {math.ceil(self.memory_gb)} GiB{least}"


@dataclasses.dataclass(frozen=True)
class Spread:
    """A setting that divides a model among more workers: its current value `now` and larger ones to try, ascending."""

    setting: str
    now: int
    more: tuple[int, ...]


def find_remedy(
    measure: Callable[[Optimizer, int], Memory],
    optimizer: Optimizer,
    spread: Spread,
    *,
    section: str,
    sequence_length: int,
    pool_gb: float,
    host_gb: float | None = None,
    sharded: bool,
    step_seconds: float,
    adapters: bool = False,
    alone: bool = True,
) -> Remedy:
    """Try every combination of memory settings by cost (`plan.fitting`), and return the first that fits.

    If none fit, try them with more workers, or with more and smaller sub-models.

    Args:
        measure: Function that returns the memory of a worker for optimizer settings and a value of the spread's
            setting.
        optimizer: The current optimizer settings.
        spread: The setting that divides the model further.
        section: Dotted path of the optimizer's section in the configuration.
        sequence_length: Tokens per sequence.
        pool_gb: Memory of a worker of the pool (GiB).
        host_gb: Main memory that a worker may fill with offloaded state (GiB); None if unknown.
        sharded: Whether the spread also divides the batch of a step, as sharded training does.
        step_seconds: Time of a step without recomputation (s).
        alone: Whether a model that is not sharded is always on one worker.
        adapters: Whether adapters are trained instead of the weights, which allows neither blocks nor offloading.
    """
    tried: list[tuple[bool, int, tuple[str, ...]]] = []
    for wider in (spread.now, *spread.more):
        workers = wider if sharded else 1
        trials = combinations(
            optimizer, sequence_length, workers, alone=alone and workers == 1 and not adapters, everything=True
        )
        for _, trial in by_cost(functools.partial(_at, measure, wider), trials, step_seconds):
            memory = measure(trial, wider)
            widened = (f"{spread.setting}={wider}",) if wider != spread.now else ()
            settings = changes(optimizer, trial, section) + widened
            if memory.fits(pool_gb, host_gb):
                return Remedy(fits=True, settings=settings, memory_gb=memory.total / GIB)
            tried.append((not memory.fits(math.inf, host_gb), memory.total, settings))
    _, total, settings = min(tried, key=lambda attempt: attempt[:2])
    return Remedy(fits=False, settings=settings, memory_gb=total / GIB)


def _at(measure: Callable[[Optimizer, int], Memory], wider: int, trial: Optimizer) -> Memory:
    return measure(trial, wider)
