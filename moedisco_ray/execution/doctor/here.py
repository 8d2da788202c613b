"""Examine what a configuration would run on: the slots of a Ray cluster, or this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import local_gpus
from moedisco_ray.core.records.measurements import THIS_MACHINE, Check, Measurements
from moedisco_ray.execution.doctor.examination import examine_slots
from moedisco_ray.execution.doctor.local_slots import local_slots
from moedisco_ray.execution.doctor.work import Work
from moedisco_ray.execution.local_gpus import lacking_gpus

Show = Callable[[str, Sequence[Check]], None]


def examine_here(config: RunConfig, work: Work, show: Show, gpus: int | None = None) -> Measurements:
    """Examine this machine.

    Args:
        config: The configuration.
        work: What to try, from the configuration.
        show: Called with the name of what was tried and its checks, as soon as they are known.
        gpus: Number of cards of this machine; None: those that the driver lists.
    """
    cards = local_gpus() if gpus is None else gpus
    lacking = [
        Check(part="system", name=error.field, state="failed", found=error.remedy)
        for error in lacking_gpus(config, cards)
        if work.configured
    ]
    if lacking:
        show(THIS_MACHINE, lacking)
    with local_slots(work, cards) as slots:
        found = examine_slots(slots, work, THIS_MACHINE, show)
    return found.model_copy(update={"checks": [*lacking, *found.checks]})
