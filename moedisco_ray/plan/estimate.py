"""Planned time and cost of every stage.

The time of a stage is its operations (`plan.cost`) divided by the workers' speed (`plan.speed`), plus start-up times:

* the driver and Ray start once per run;
* each worker process starts once per stage. A training worker starts once per wave, after Ray Train's controller has
  started; the controller's time costs nothing;
* corpus: the head's cores tokenize the sources, which costs nothing; the time is unknown if the size of the sources is
  unknown;
* training: `evaluation.every_tokens` adds forward passes that measure the held-out loss; GPU workers, which are at
  different machines, wait for syncs;
* cluster: if the vectors are hidden states, the seed model reads 1.25 times the sub-models' tokens;
* merge: the model reads the calibration tokens once per layer, on average through half of its layers;
* evaluate: each measured model, and the model that assigns documents to clusters, reads the validation tokens; the
  finished model reads those of `evaluation.sources`; for an ensemble, all sub-models read the tokens, and computing the
  ensemble's weights takes more forward passes;
* export: the model generates samples from the prompts.

The estimate leaves out k-means and the time to write files and checkpoints. It also leaves out `evaluation.lm_eval`,
because a plan does not read task files: `left_out` names this setting, and the bill is marked as incomplete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from moedisco_ray.core.bill import Baseline, Bill, Line, is_joint_training, line, make_baseline, make_bill, sum_dollars
from moedisco_ray.core.config import Architecture, CheckpointInit, Pool, RunConfig
from moedisco_ray.core.limits import ENSEMBLE_BLOCK
from moedisco_ray.core.stages import STAGES, TRAINING
from moedisco_ray.plan.cost import Cost, TypeShare, flops_per_token
from moedisco_ray.plan.parameters import Parameters, count_parameters, submodel_architecture
from moedisco_ray.plan.speed import Machine, seconds_for, start_up

CLUSTERED = 1.25
"""Ratio of the tokens that are clustered to the tokens that the sub-models train on, if the corpus is large enough.
Thanks to the additional text, no sub-model has to repeat text, and routers are also calibrated on text that no
sub-model has trained on."""


class StageEstimate(BaseModel, frozen=True):
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
    lines: tuple[Line, ...] = ()
    """Work that costs money, per pool. If the node type in a mixed pool is not known before the run, the most expensive
    one is assumed."""


class Training(BaseModel, frozen=True):
    """The facts about a training stage from which its time is estimated."""

    cost: Cost
    units: int
    at_once: int
    """Number of models that train at the same time."""
    workers_per_unit: int
    experts: int
    types: tuple[TypeShare, ...] = ()
    sync_seconds: float = 0.0
    """Time that the syncs take (seconds). Models that take turns on slots give them up meanwhile."""


def estimate_stages(
    config: RunConfig, trainings: Mapping[str, Training], vocab_size: int, machine: Machine
) -> tuple[StageEstimate, ...]:
    """Estimates of all stages, in pipeline order."""
    reading = _Reading(config, vocab_size, machine)
    return tuple(
        _training(
            config,
            stage.name,
            trainings[stage.name],
            reading.held_out_loss(stage.name, trainings[stage.name].cost.tokens),
            machine,
        )
        if stage.name in trainings
        else reading.stage(stage.name)
        for stage in STAGES
    )


def planned_bill(
    config: RunConfig,
    stages: Sequence[StageEstimate],
    trainings: Mapping[str, Training],
    vocab_size: int,
    machine: Machine,
) -> Bill:
    """The estimated bill of a run, in the same form as the bill of a finished run."""
    return make_bill(
        [each for stage in stages for each in stage.lines],
        seconds=_total([start_up(None, machine), *(each.seconds for each in stages)]),
        planned=True,
        complete=not left_out(config),
        baseline=_baseline(config, trainings, vocab_size, machine),
    )


def left_out(config: RunConfig) -> tuple[str, ...]:
    """Settings whose cost a plan does not include."""
    return ("evaluation.lm_eval",) if config.evaluation.lm_eval else ()


def _baseline(
    config: RunConfig, trainings: Mapping[str, Training], vocab_size: int, machine: Machine
) -> Baseline | None:
    whole = trainings.get("finetune")
    if whole is None or is_joint_training(config, {stage: each.cost.tokens for stage, each in trainings.items()}):
        return None
    pool, high = config.finetune_pool, config.pools.high_memory
    reading = _Reading(config, vocab_size, machine)
    seconds = seconds_for(pool, machine, whole.cost.flops, whole.cost.flops / whole.cost.tokens, whole.experts)
    measuring = reading.held_out_loss("finetune", whole.cost.tokens)
    starting, evaluated, exported = start_up(high, machine), reading.evaluate(finished_only=True), reading.export()
    if seconds is None or measuring is None or starting is None or evaluated is None or exported is None:
        return None
    seconds += measuring * high.fewest_workers
    crowd = _crowd(high, high.fewest_workers, machine)
    return make_baseline(
        config,
        tokens=sum(each.cost.tokens for each in trainings.values()),
        seconds_per_token=crowd * seconds / whole.cost.tokens,
        start_up=crowd * starting,
        evaluate=evaluated,
        export=exported,
        rate="planned",
    )


def _training(
    config: RunConfig, stage: str, training: Training, measuring: float | None, machine: Machine
) -> StageEstimate:
    pool = config.finetune_pool if stage == "finetune" else config.pools.low_memory
    cost = training.cost
    starting, controller = start_up(pool, machine), start_up(None if not pool.gpu else pool, machine)
    each = cost.flops / cost.tokens
    seconds = seconds_for(pool.node_types[0], machine, cost.flops, each, training.experts)
    if starting is None or controller is None or seconds is None or measuring is None:
        return _unknown(stage, pool)
    crowd = _crowd(pool, training.at_once * training.workers_per_unit, machine)
    syncing = training.sync_seconds if pool.gpu else 0.0
    waiting = syncing if training.units <= training.at_once else 0.0
    owners = config.owners if stage == "submodels" else ()
    shared = training.units - len(owners)
    working = 3600 * cost.worker_hours if pool.gpu else seconds  # in a mixed pool, each node type has its own speed
    parts = [
        (
            f"{pool.key}.{share.name}",
            share.units,
            3600 * share.worker_hours if pool.gpu else seconds * share.units / training.units,
        )
        for share in training.types
    ] or [(pool.key, shared, working * shared / training.units)]
    owned = working - sum(each for _, _, each in parts)
    parts += [(f"owners.{name}", 1, owned / len(owners)) for name in owners]
    lines = [
        line(stage, key, (each + (starting + measuring + waiting) * units * training.workers_per_unit) * crowd, config)
        for key, units, each in parts
        if units
    ]
    wall = 3600 * cost.hours if pool.gpu else cost.waves * seconds / training.units / training.workers_per_unit
    return _priced(
        stage, pool, (wall + cost.waves * (starting + measuring) + syncing) * crowd + cost.waves * controller, lines
    )


def _priced(stage: str, pool: Pool, seconds: float, lines: Sequence[Line]) -> StageEstimate:
    return StageEstimate(
        stage=stage,
        pool=pool.name,
        seconds=seconds,
        worker_seconds=_total([each.worker_seconds for each in lines]),
        dollars=sum_dollars(lines),
        lines=tuple(lines),
    )


def _unknown(stage: str, pool: Pool) -> StageEstimate:
    return StageEstimate(
        stage=stage,
        pool=pool.name,
        seconds=None,
        worker_seconds=None,
        dollars=None,
        lines=(Line(stage=stage, pool=pool.name, worker_seconds=None, dollars=None),),
    )


def _crowd(pool: Pool, workers: int, machine: Machine) -> float:
    """Factor by which workers that share cores slow each other down."""
    return 1.0 if pool.gpu or machine.probe is None else max(1.0, workers / machine.probe.cores)


class _Reading:
    """Estimates of the work that runs text through a model without training it."""

    def __init__(self, config: RunConfig, vocab_size: int, machine: Machine) -> None:
        self._config, self._vocab_size, self._machine = config, vocab_size, machine
        self._whole = config.model.architecture
        self._part = submodel_architecture(config.model.family_name, self._whole, config.cluster_count)

    def stage(self, name: str) -> StageEstimate:
        """Estimate of a stage in which no training takes place.

        Raises:
            LookupError: Nothing here says what the stage costs; 0 dollars would be a wrong guess.
        """
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
                return self._divided(name, pool, seconds, 1)
            case _ if name in TRAINING:
                return self._on_head(name, 0.0)  # it has no tokens, and takes over its input
        raise LookupError(f"no time is planned for stage {name}")

    def evaluate(self, *, finished_only: bool = False) -> float | None:
        """Seconds that the evaluation takes one worker; with `finished_only`, only the finished model is evaluated."""
        config, evaluation = self._config, self._config.evaluation
        tokens = evaluation.max_tokens
        passes = [self._read(tokens, whole=True)]
        if evaluation.sources:
            passes.append(self._read(tokens, whole=True))
        if finished_only:
            return _total([*passes, self._starting(config.finetune_pool)])
        if evaluation.stages and config.tokens.decoupled:
            passes += [self._read(tokens, whole=True), self._read(tokens, whole=False)]
        if evaluation.stages and config.tokens.seed:
            passes.append(self._read(tokens, whole=False))
        if config.measures_start:
            texts = 2 if evaluation.sources else 1
            passes.append(self._read(texts * tokens, whole=self._vectors_of_whole))
        if config.vectors_pool is not None:
            passes.append(self._read(tokens, whole=self._vectors_of_whole))
        if evaluation.ensemble:
            passes.append(self._read(config.cluster_count * tokens, whole=False))
            if config.vectors_pool is not None:
                # The ensemble's weights for a block depend on the text before the block, which is half a sequence long
                # on average.
                contexts = tokens * config.corpus.sequence_length // (2 * ENSEMBLE_BLOCK)
                passes.append(self._read(contexts, whole=self._vectors_of_whole))
        return _total([*passes, self._starting(config.finetune_pool)])

    def export(self) -> float | None:
        """Seconds that one worker needs for the export."""
        evaluation = self._config.evaluation
        samples = self._read(len(evaluation.prompts) * evaluation.sample_tokens, whole=True)
        return _total([samples, self._starting(self._config.finetune_pool)])

    def held_out_loss(self, stage: str, tokens: int) -> float | None:
        """Seconds per worker to measure the held-out loss during a training stage and at its end; 0 for sub-models."""
        evaluation = self._config.evaluation
        if evaluation.every_tokens is None or stage == "submodels":
            return 0.0
        whole = stage == "finetune"
        batch = (self._config.finetune if whole else self._config.submodels).optimizer.batch_tokens
        if stage == "seed":  # its members make their steps at the same time
            batch *= self._config.seed_members
        count = -(-tokens // batch // max(1, evaluation.every_tokens // batch))
        pool = self._config.finetune_pool if whole else self._config.pools.low_memory
        return self._read(count * evaluation.slice_tokens, whole=whole, pool=pool)

    def _merge(self) -> float | None:
        config = self._config
        # Each layer runs once without its experts, to compute its router's input. Then each layer but the last runs
        # again, in full.
        calibrated = round(config.merge.calibration_tokens * (2 - 1 / self._whole.num_hidden_layers))
        work = self._read(calibrated, whole=True) if config.tokens.decoupled or config.tokens.seed else 0.0
        return _total([work, self._starting(config.finetune_pool)])

    @property
    def _vectors_of_whole(self) -> bool:
        return isinstance(self._config.model.init, CheckpointInit)

    def _cluster(self) -> StageEstimate:
        config = self._config
        pool = config.vectors_pool
        if not config.tokens.decoupled:
            return self._on_head("cluster", 0.0)
        if pool is None:
            return self._on_head("cluster", self._starting(None))
        text = self._read(round(CLUSTERED * config.tokens.submodels), whole=self._vectors_of_whole, pool=pool)
        return self._divided(
            "cluster", pool, _total([text, self._starting(pool)]), min(pool.max_workers, config.cluster_count)
        )

    def _corpus(self) -> float | None:
        probe, size = self._machine.probe, self._machine.text_bytes
        return None if probe is None or size is None else probe.start_up_seconds + size / probe.text_bytes_per_second

    def _read(self, tokens: int, *, whole: bool, pool: Pool | None = None) -> float | None:
        """Seconds that a forward pass over tokens takes one worker: a third of a training step's operations."""
        shape = self._whole if whole else self._part
        each = self._flops(shape)
        experts = shape.num_experts
        return seconds_for(
            (pool or self._config.finetune_pool).node_types[0], self._machine, tokens * each / 3, each, experts
        )

    def _flops(self, shape: Architecture) -> float:
        parameters: Parameters = count_parameters(self._config.model.family_name, shape, self._vocab_size)
        return flops_per_token(parameters, shape, self._config.corpus.sequence_length, checkpointing=False)

    def _starting(self, pool: Pool | None) -> float | None:
        return start_up(pool, self._machine)

    def _divided(self, stage: str, pool: Pool, one: float | None, workers: int) -> StageEstimate:
        """Estimate of a stage whose workers share its work, which would take a single worker `one` seconds."""
        starting = self._starting(pool)
        if one is None or starting is None:
            return _unknown(stage, pool)
        held = one + starting * (workers - 1)
        crowd = _crowd(pool, workers, self._machine)
        kind = max(pool.node_types, key=lambda each: each.price_per_hour)
        return _priced(stage, pool, held / workers * crowd, [line(stage, kind.key, held * crowd, self._config)])

    @staticmethod
    def _on_head(stage: str, seconds: float | None) -> StageEstimate:
        return StageEstimate(stage=stage, pool="head", seconds=seconds, worker_seconds=0.0, dollars=0.0)


def _total(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)
