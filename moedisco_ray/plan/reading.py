"""What the planned time of a stage is made of: forward passes over text, starts of workers, and shares of work."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import Architecture, Pool, RunConfig
from moedisco_ray.core.records.bill import Line, line, sum_dollars
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.plan.speed import Machine, seconds_for, start_up

HEAD = "head"
"""The head node in place of a pool."""


class StageEstimate(BaseModel, frozen=True, defer_build=True):
    """The estimate of one stage."""

    stage: str
    pool: str
    """The pool that does the work: `low_memory`, `high_memory`, or `head` for the head node, which costs nothing."""
    seconds: float | None
    """Wall-clock time in seconds; null if unknown."""
    worker_seconds: float | None
    """Seconds for which workers hold slots that cost money, summed over workers, with start-ups; null if unknown."""
    dollars: float | None
    """Sum of the dollars of all `lines`; null if unknown."""
    unbilled_seconds: float = 0.0
    """Part of `seconds` in which no worker holds a slot yet: the start of what starts them."""
    lines: tuple[Line, ...] = ()
    """Work that costs money, per pool. If the node type in a mixed pool is not known before the run, the most expensive
    one is assumed."""


class Reading:
    """Estimates of the work that runs text through a model without training it.

    Attributes:
        config: The run's configuration.
        machine: What is known of the machines.
        warm: Name of the pool whose processes the stage before has left, and this stage uses; None if none.
    """

    def __init__(self, config: RunConfig, vocab_size: int, machine: Machine, warm: str | None = None) -> None:
        self.config, self.machine, self.warm, self._vocab_size = config, machine, warm, vocab_size
        self._part = submodel_architecture(config.model.family_name, self._whole, config.cluster_count)

    @property
    def _whole(self) -> Architecture:
        return self.config.model.architecture

    @property
    def vectors_of_whole(self) -> bool:
        """Whether documents' vectors are hidden states of a model as large as the MoE."""
        return self.config.model.starts_from_moe

    def passes(self, tokens: int, *, whole: bool, pool: Pool | None = None) -> float | None:
        """Seconds that a forward pass over tokens takes one worker: a third of a training step's operations.

        Args:
            tokens: Number of tokens.
            whole: Whether the whole MoE reads them, or a sub-model.
            pool: Pool of the worker; by default that of the fine-tune.
        """
        shape = self._whole if whole else self._part
        parameters = count_parameters(self.config.model.family_name, shape, self._vocab_size)
        each = flops_per_token(parameters, shape, self.config.corpus.sequence_length, checkpointing=False)
        kind = (pool or self.config.finetune_pool).node_types[0]
        return seconds_for(kind, self.machine, tokens * each / 3, each, shape.num_experts)

    def starting(self, pool: Pool | None) -> float | None:
        """Seconds until a worker of a pool, or without a pool the driver, has started; 0 for a process that is kept."""
        return 0.0 if pool is not None and pool.name == self.warm else start_up(pool, self.machine)

    def on_head(self, stage: str, seconds: float | None) -> StageEstimate:
        """Estimate of a stage whose work the head node does."""
        return StageEstimate(stage=stage, pool=HEAD, seconds=seconds, worker_seconds=0.0, dollars=0.0)

    def divided(self, stage: str, pool: Pool, one: float | None, workers: int = 1) -> StageEstimate:
        """Estimate of a stage whose workers share its work, which would take a single worker `one` seconds."""
        starting = self.starting(pool)
        if one is None or starting is None:
            return unknown(stage, pool)
        held = one + starting * (workers - 1)
        factor = crowd(pool, workers, self.machine)
        kind = max(pool.node_types, key=lambda each: each.price_per_hour)
        return priced(stage, pool, held / workers * factor, [line(stage, kind.key, held * factor, self.config)])


def priced(
    stage: str, pool: Pool, seconds: float, lines: Sequence[Line], unbilled_seconds: float = 0.0
) -> StageEstimate:
    """Estimate of a stage from the lines of its bill."""
    return StageEstimate(
        stage=stage,
        pool=pool.name,
        seconds=seconds,
        worker_seconds=total([each.worker_seconds for each in lines]),
        dollars=sum_dollars(lines),
        unbilled_seconds=unbilled_seconds,
        lines=tuple(lines),
    )


def unknown(stage: str, pool: Pool) -> StageEstimate:
    """Estimate of a stage whose time and cost are unknown."""
    return StageEstimate(
        stage=stage,
        pool=pool.name,
        seconds=None,
        worker_seconds=None,
        dollars=None,
        lines=(Line(stage=stage, pool=pool.name, worker_seconds=None, dollars=None),),
    )


def crowd(pool: Pool, workers: int, machine: Machine) -> float:
    """Factor by which workers that share cores slow each other down."""
    return 1.0 if pool.gpu or machine.probe is None else max(1.0, workers / machine.probe.cores)


def total(values: Sequence[float | None]) -> float | None:
    """Sum of the values; None if one of them is unknown."""
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)
