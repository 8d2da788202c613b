"""Plan of the stages that run text through a model without training it: whether their workers fit, and what helps."""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.stages import STAGES
from moedisco_ray.plan.memory import GIB
from moedisco_ray.plan.remedy import Remedy
from moedisco_ray.plan.stage_cost import Work, cost_of
from moedisco_ray.plan.stage_memory import Streams
from moedisco_ray.plan.worker_plan import InferencePlan


def plan_inference(config: RunConfig, vocab_size: int) -> tuple[InferencePlan, ...]:
    """The stages that run text through a model without training it, in pipeline order.

    Args:
        config: The run's configuration.
        vocab_size: Entries of the vocabulary.
    """
    streams = Streams(config, vocab_size)
    return tuple(_planned(work) for stage in STAGES for work in cost_of(stage).works(streams))


def _planned(work: Work) -> InferencePlan:
    memory, pool_gb = work.measure(work.tokens), max(kind.memory_gb for kind in work.pool.node_types)
    fits = memory.total <= pool_gb * GIB
    return InferencePlan(
        stage=work.stage,
        pool=work.pool.name,
        memory=memory,
        pool_gb=pool_gb,
        fits=fits,
        fits_known=work.pool.gpu > 0,
        remedy=None if fits else _remedy(work, pool_gb),
    )


def _remedy(work: Work, pool_gb: float) -> Remedy:
    """The most tokens, of those halved again and again, with which the work fits."""
    if work.remedy is not None:
        return Remedy(fits=True, settings=(work.remedy,), memory_gb=0)
    fewer = [work.tokens >> times for times in range(1, work.tokens.bit_length())]
    totals = [work.measure(tokens).total for tokens in fewer]
    found = next((index for index, total in enumerate(totals) if total <= pool_gb * GIB), None)
    if found is None:
        return Remedy(fits=False, settings=(), memory_gb=work.measure(work.tokens).total / GIB)
    return Remedy(fits=True, settings=(f"{work.setting}={fewer[found]}",), memory_gb=totals[found] / GIB)
