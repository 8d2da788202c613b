"""Time and cost of every stage, planned: training, and what stands around it.

Operations are counted (`plan.cost`), divided by the workers' speed (`plan.speed`), and start-ups are added:

* the run starts: its driver, and Ray;
* each process that works on a pool starts once per stage; trainers start once per wave, after a controller that holds no slot;
* corpus: tokenizing the sources' bytes on the head's cores; unpriced. Unknown where the sources' size is;
* cluster: forward passes of the seed model over 1.25 times the sub-models' tokens (all of the text: unknown), where vectors are
  hidden states;
* merge: the calibration tokens, once per layer through half of the whole model on average, and once more to compare;
* evaluate: the validation tokens through every model that is measured;
* export: the prompts, token by token, and two loads.

A step that the arithmetic does not cover (k-means, files, checkpoints) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from moedisco_ray.bill import Baseline, Bill, Line, is_full_training, line, make_baseline, make_bill
from moedisco_ray.config import Architecture, CheckpointInit, Pool, RunConfig
from moedisco_ray.plan.cost import Cost, TypeShare, flops_per_token
from moedisco_ray.plan.parameters import Parameters, count_parameters, submodel_architecture
from moedisco_ray.plan.speed import Machine, seconds_for, start_up
from moedisco_ray.stages import STAGES

CLUSTERED = 1.25
"""Text that is clustered, as a multiple of the sub-models' tokens, where `clusters.text` is `needed`."""


class StageEstimate(BaseModel):
    """One stage of the pipeline, planned."""

    model_config = ConfigDict(frozen=True)

    stage: str
    pool: str
    """`low_memory`, `high_memory` or `head`, which is not priced."""
    seconds: float | None
    """Wall-clock; null: unknown."""
    worker_seconds: float | None
    """For which priced slots are held, start-ups included; null: unknown."""
    dollars: float | None
    """At the pool's price; null: unknown."""


class Training(BaseModel):
    """What an estimate takes from a training stage of the plan."""

    model_config = ConfigDict(frozen=True)

    cost: Cost
    units: int
    at_once: int
    """Models that train at once."""
    workers_per_unit: int
    experts: int
    types: tuple[TypeShare, ...] = ()


def estimate_stages(
    config: RunConfig, trainings: Mapping[str, Training], vocab_size: int, machine: Machine,
) -> tuple[StageEstimate, ...]:
    """Every stage, in pipeline order."""
    reading = _Reading(config, vocab_size, machine)
    return tuple(
        _training(config, stage.name, trainings[stage.name], machine) if stage.name in trainings else reading.stage(stage.name)
        for stage in STAGES)


def planned_bill(
    config: RunConfig, stages: Sequence[StageEstimate], trainings: Mapping[str, Training], vocab_size: int, machine: Machine,
) -> Bill:
    """The bill of a plan: the same structure as a run's."""
    lines: list[Line] = []
    for each in stages:
        if each.pool == "head" or each.worker_seconds == 0:
            continue
        shares = trainings[each.stage].types if each.stage in trainings else ()
        total = sum(share.worker_hours for share in shares)
        if not shares or not total:
            lines.append(line(each.stage, each.pool, each.worker_seconds, config))
            continue
        lines += [
            line(each.stage, f"{each.pool}.{share.name}",
                 None if each.worker_seconds is None else each.worker_seconds * share.worker_hours / total, config)
            for share in shares if share.worker_hours]
    return make_bill(
        lines, seconds=_total([start_up(None, machine), *(each.seconds for each in stages)]), planned=True, complete=True,
        baseline=_baseline(config, trainings, vocab_size, machine))


def _baseline(config: RunConfig, trainings: Mapping[str, Training], vocab_size: int, machine: Machine) -> Baseline | None:
    whole = trainings.get("finetune")
    if whole is None or is_full_training(config, {stage: each.cost.tokens for stage, each in trainings.items()}):
        return None
    pool = config.finetune_pool
    seconds = seconds_for(pool, machine, whole.cost.flops, whole.cost.flops / whole.cost.tokens, whole.experts)
    reading = _Reading(config, vocab_size, machine)
    starting, evaluated, exported = start_up(pool, machine), reading.evaluate(finished_only=True), reading.export()
    if seconds is None or starting is None or evaluated is None or exported is None:
        return None
    return make_baseline(
        config, tokens=config.tokens.total, seconds_per_token=seconds / whole.cost.tokens,
        start_up=starting * whole.workers_per_unit, evaluate=evaluated, export=exported, rate="planned")


def _training(config: RunConfig, stage: str, training: Training, machine: Machine) -> StageEstimate:
    pool = config.finetune_pool if stage == "finetune" else config.pools.low_memory
    cost = training.cost
    starting, controller = start_up(pool, machine), start_up(None if not pool.gpu else pool, machine)
    each = cost.flops / cost.tokens
    seconds = seconds_for(pool.kinds[0], machine, cost.flops, each, training.experts)
    if starting is None or controller is None or seconds is None:
        return StageEstimate(stage=stage, pool=pool.kind, seconds=None, worker_seconds=None, dollars=None)
    working = 3600 * cost.worker_hours if pool.gpu else seconds    # of a mixed pool, each type at its own speed
    held = working + starting * training.units * training.workers_per_unit
    workers = training.at_once * training.workers_per_unit
    crowd = _crowd(pool, workers, machine)
    wall = 3600 * cost.hours if pool.gpu else cost.waves * working / training.units / training.workers_per_unit
    lines = line(stage, pool.key, held * crowd, config)
    return StageEstimate(
        stage=stage, pool=pool.kind, seconds=(wall + cost.waves * starting) * crowd + cost.waves * controller,
        worker_seconds=held * crowd, dollars=_mixed_dollars(training, starting, config) if training.types else lines.dollars)


def _mixed_dollars(training: Training, starting: float, config: RunConfig) -> float:
    prices = {kind.key: kind.price_per_hour for kind in config.pools.low_memory.kinds}
    return sum(
        share.dollars + starting * share.units / 3600 * prices[f"low_memory.{share.name}"] for share in training.types)


def _crowd(pool: Pool, workers: int, machine: Machine) -> float:
    """Slow-down of workers that share cores."""
    return 1.0 if pool.gpu or machine.probe is None else max(1.0, workers / machine.probe.cores)


class _Reading:
    """Stages that read text without training on it."""

    def __init__(self, config: RunConfig, vocab_size: int, machine: Machine) -> None:
        self._config, self._vocab_size, self._machine = config, vocab_size, machine
        self._whole = config.model.architecture
        self._part = submodel_architecture(self._whole, config.clusters.count)

    def stage(self, name: str) -> StageEstimate:
        """A stage that is no training, or trains nothing in this run."""
        config = self._config
        match name:
            case "corpus":
                return self._on_head(name, self._corpus())
            case "decompose":
                return self._on_head(name, self._starting(None) if config.tokens.decoupled else 0.0)
            case "cluster":
                return self._cluster()
            case "merge" | "evaluate" | "export":
                pool = config.finetune_pool
                seconds = {"merge": self._merge, "evaluate": self.evaluate, "export": self.export}[name]()
                return self._held(name, pool, seconds, 1)
        return self._on_head(name, 0.0)

    def evaluate(self, *, finished_only: bool = False) -> float | None:
        """Seconds of one worker.

        Args:
            finished_only: Measure the finished model alone, as full training would.
        """
        config = self._config
        tokens = config.evaluation.max_tokens
        passes = [self._read(tokens, whole=True)]
        if config.evaluation.stages and not finished_only and config.tokens.decoupled:
            passes += [self._read(tokens, whole=True), self._read(tokens, whole=False)]
        if config.evaluation.stages and not finished_only and config.tokens.seed:
            passes.append(self._read(tokens, whole=False))
        return _total([*passes, self._starting(config.finetune_pool)])

    def export(self) -> float | None:
        """Seconds of one worker."""
        evaluation = self._config.evaluation
        return self._read(len(evaluation.prompts) * evaluation.sample_tokens, whole=True)

    def _merge(self) -> float | None:
        config = self._config
        passes = config.merge.calibration_tokens * (0.5 * self._whole.num_hidden_layers + 1)
        work = self._read(round(passes), whole=True) if config.tokens.decoupled else 0.0
        return _total([work, self._starting(config.finetune_pool)])

    def _cluster(self) -> StageEstimate:
        config = self._config
        pool = config.vectors_pool
        if not config.tokens.decoupled:
            return self._on_head("cluster", 0.0)
        if pool is None:
            return self._on_head("cluster", self._starting(None))
        whole = isinstance(config.model.init, CheckpointInit)
        text = self._read(round(CLUSTERED * config.tokens.submodels), whole=whole, pool=pool)
        if config.clusters.text == "all":
            text = None
        return self._held("cluster", pool, _total([text, self._starting(pool)]), min(pool.max_workers, config.clusters.count))

    def _corpus(self) -> float | None:
        probe, size = self._machine.probe, self._machine.text_bytes
        return None if probe is None or size is None else probe.start_up_seconds + size / probe.text_bytes_per_second

    def _read(self, tokens: int, *, whole: bool, pool: Pool | None = None) -> float | None:
        """Seconds of one worker to read tokens: a third of a training step's operations."""
        shape = self._whole if whole else self._part
        each = self._flops(shape)
        experts = shape.num_experts
        return seconds_for((pool or self._config.finetune_pool).kinds[0], self._machine, tokens * each / 3, each, experts)

    def _flops(self, shape: Architecture) -> float:
        parameters: Parameters = count_parameters(self._config.model.family, shape, self._vocab_size)
        return flops_per_token(parameters, shape, self._config.corpus.sequence_length, checkpointing=False)

    def _starting(self, pool: Pool | None) -> float | None:
        return start_up(pool, self._machine)

    def _held(self, stage: str, pool: Pool, one: float | None, workers: int) -> StageEstimate:
        """A stage whose work is divided over workers, each of which starts."""
        starting = self._starting(pool)
        if one is None or starting is None:
            return StageEstimate(stage=stage, pool=pool.kind, seconds=None, worker_seconds=None, dollars=None)
        held = one + starting * (workers - 1)
        crowd = _crowd(pool, workers, self._machine)
        dollars = max(held / 3600 * kind.price_per_hour for kind in pool.kinds)
        return StageEstimate(
            stage=stage, pool=pool.kind, seconds=held / workers * crowd, worker_seconds=held * crowd, dollars=dollars * crowd)

    @staticmethod
    def _on_head(stage: str, seconds: float | None) -> StageEstimate:
        return StageEstimate(stage=stage, pool="head", seconds=seconds, worker_seconds=0.0, dollars=0.0)


def _total(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)
