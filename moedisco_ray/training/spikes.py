from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from torch import Tensor

from moedisco_ray.core.events import Emit, Event
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import TrainJob, World

_REMEMBERED = 64
_AT_LEAST = 16
"""Norms to have seen before one can stand out."""


class SpikeGuard:
    """Leaves out updates whose gradient stands out from those before.

    One bad batch can throw a model back by hundreds of steps; left out, it costs its own tokens. The threshold is a
    multiple of a median, which a spike does not move. Gradients that have become larger for good are the usual ones after half
    of what is remembered; where another phase begins or a dense gate ends, all of it is forgotten.

    Args:
        job: Its `spike_guard` is the multiple; None: nothing is left out, and no norm is read.
        world: This process.
        emit: Told of what is left out, on rank 0.
        progress: Keeps the norms, so that a resumed training decides alike.
        changes_at: Whether a step is the first after some of another kind.
    """

    def __init__(
        self, job: TrainJob, world: World, emit: Emit, progress: Progress, changes_at: Callable[[int], bool],
    ) -> None:
        self._job = job
        self._world = world
        self._emit = emit
        self._progress = progress
        self._changes_at = changes_at

    def refuses(self, step: int, norm: Tensor) -> bool:
        """Whether the update of a step, counted from 0, is left out. Reading the norm makes a GPU wait."""
        if self._job.spike_guard is None:
            return False
        value = float(norm)
        known = self._progress.norms
        if self._changes_at(step):
            known.clear()
        if not math.isfinite(value):
            return False    # the ledger's business: it ends the training
        median = statistics.median(known) if len(known) >= _AT_LEAST else math.inf
        known.append(value)
        del known[:-_REMEMBERED]
        if value <= self._job.spike_guard * median:
            return False
        if self._world.rank == 0:
            self._emit(Event("warning", self._job.stage, self._job.name, {
                "message": f"{self._job.name}: step {step + 1} left out, its gradient's norm {value:.3g} is "
                           f"{value / median:.1f} times the usual {median:.3g}"}))
        return True
