"""The pipeline's stages: their order, their inputs, and the settings that their results depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from moedisco_ray.core.config import (
    AnyPool,
    Finetune,
    LocalInit,
    Lora,
    RunConfig,
    Submodels,
    TrainingStageName,
    derived,
)
from moedisco_ray.core.config.effects import leaves

Derived = Callable[[RunConfig], Mapping[str, Any]]
Place = Literal["low_memory", "high_memory", "head"]
"""Where a stage's work is done: the slots of a pool, or the head node, which costs nothing."""


def _nothing(_config: RunConfig) -> Mapping[str, Any]:
    return {}


def _head(_config: RunConfig) -> Place:
    return "head"


def _low_memory(_config: RunConfig) -> Place:
    return "low_memory"


def _with_the_gang(config: RunConfig) -> Place:
    """The pool of the fine-tune: the stage works on the whole MoE."""
    return config.finetune.pool


def _where_vectors_are_made(config: RunConfig) -> Place:
    return "head" if config.vectors_pool is None or not config.tokens.decoupled else config.vectors_pool.name


def _where_a_start_is_cut(config: RunConfig) -> Place:
    # Machines of the gang would be kept from then on until the merge.
    return "low_memory" if derived.measures_cut(config) else "head"


def _never(_config: RunConfig) -> bool:
    return False


def _always(_config: RunConfig) -> bool:
    return True


def _starts_from_a_model(config: RunConfig) -> bool:
    return isinstance(config.model.init, LocalInit)


def _one(_config: RunConfig) -> int:
    return 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the pipeline and one artifact of the run directory.

    `work` and `cost` are names of values, as in `core.registry`: what plans and serves imports no torch.

    Attributes:
        name: Name of the stage in events, reports and on the command line.
        directory: Folder of the stage's artifact in the run directory.
        needs: Stages whose artifacts this stage reads.
        reads: Sections and settings, as dotted paths, that the stage's result depends on. The stage's fingerprint
            leaves out those that are marked `NoEffect` or `Resolved`.
        place: Where the stage's work is done, by the configuration.
        work: `MODULE:FUNCTION` that makes the artifact, from a `stages.context.Context` and a `Draft` (`core.store`).
        cost: `MODULE:VALUE` of its `plan.stage_cost.StageCost`: time, dollars, files and memory.
        derived: Values that follow from several settings, such as the precision that the pool computes in.
        reads_files: Whether it reads files of the user; then its fingerprint depends on them, and cannot be computed
            where they are not.
        makes_model: Whether its artifact is one model, which the evaluation can measure.
    """

    name: str
    directory: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    place: Callable[[RunConfig], Place]
    work: str
    cost: str
    derived: Derived = _nothing
    reads_files: Callable[[RunConfig], bool] = _never
    makes_model: Callable[[RunConfig], bool] = _never

    @property
    def trains(self) -> bool:
        """Whether the stage trains models; then its summary is a `TrainingSummary`."""
        return isinstance(self, TrainingStage)

    @property
    def earlier(self) -> tuple[str, ...]:
        """All stages whose artifacts the stage's result depends on, directly or through others."""
        through = (each for stage in STAGES if stage.name in self.needs for each in stage.earlier)
        return tuple(dict.fromkeys([*self.needs, *through]))

    @property
    def settings(self) -> tuple[str, ...]:
        """Dotted paths of all settings that the stage's fingerprint includes."""
        return tuple(leaf.path for leaf in _LEAVES if leaf.marker is None and self._is_read(leaf.path))

    def _is_read(self, setting: str) -> bool:
        return any(_is_in(setting, path) for path in self.reads)

    def fingerprint(self, config: RunConfig, needs: Mapping[str, str], inputs: str = "") -> str:
        """Digest of everything that the stage's result depends on.

        Args:
            config: The run's configuration.
            needs: Fingerprint of each stage in `Stage.needs`.
            inputs: Identity of the user's files that the stage reads.
        """
        values = config.model_dump(mode="json")
        material = {
            "stage": self.name,
            "settings": {path: _at(values, path) for path in self.settings},
            "derived": dict(self.derived(config)),
            "needs": dict(needs),
            "inputs": inputs,
        }
        return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStage(Stage):
    """A stage that trains models: it has tokens, a speed and a loss. A new one has to say all of this.

    Attributes:
        recipe: Section of the configuration with the settings of its trainings.
        trains_whole: Whether it trains the whole MoE on a gang, and not models of a sub-model's size.
        per_cluster: Whether it trains a model for each cluster; a data owner trains that of its own.
        tokens: Number of tokens of all its trainings together.
        members: Number of trainings of one model, whose steps are made at the same time.
        syncs: What its trainings combine at sync points; None if they have none.
        keeps_state: Whether the next training continues with its optimizer state.
        measures_held_out: Whether its models are measured on held-out text while they train.
        may_adapt: Whether adapters train instead of the weights where `lora` of its section says so.
    """

    recipe: Literal["submodels", "finetune"]
    trains_whole: bool
    per_cluster: bool
    tokens: Callable[[RunConfig], int]
    members: Callable[[RunConfig], int]
    syncs: Literal["all", "backbone"] | None
    keeps_state: Callable[[RunConfig], bool]
    measures_held_out: bool
    may_adapt: bool

    def section(self, config: RunConfig) -> Submodels | Finetune:
        """Settings of its trainings."""
        return config.finetune if self.trains_whole else config.submodels

    def lora(self, config: RunConfig) -> Lora | None:
        """Adapters that train instead of the weights; None if the weights train."""
        lora = self.section(config).lora
        return lora if self.may_adapt and lora.rank else None

    def pool(self, config: RunConfig) -> AnyPool:
        """The pool that trains it."""
        return config.finetune_pool if self.trains_whole else config.pools.low_memory

    def at_once(self, config: RunConfig) -> int:
        """Maximum number of models that train at the same time."""
        if self.trains_whole:
            return 1
        return (config.pools.submodels if self.per_cluster else config.pools.low_memory).max_workers

    def span(self, config: RunConfig) -> tuple[float, float]:
        """Shares of the run's tokens at which its trainings begin and end."""
        before = sum(stage.tokens(config) for stage in TRAINING[: TRAINING.index(self)])
        return before / config.tokens.total, (before + self.tokens(config)) / config.tokens.total


STAGES: tuple[Stage, ...] = (
    Stage(
        "corpus",
        "corpus",
        needs=(),
        reads=("seed", "corpus", "tokenizer"),
        place=_head,
        work="moedisco_ray.stages.corpus.stage:run",
        cost="moedisco_ray.plan.stages.corpus:COST",
        derived=derived.places_of_owners,
        reads_files=_always,
    ),
    TrainingStage(
        "seed",
        "seed",
        needs=("corpus",),
        reads=("deterministic", "model", "tokens.total", "tokens.seed_share", "submodels.optimizer", "clusters.count"),
        place=_low_memory,
        work="moedisco_ray.execution.stage_work:seed",
        cost="moedisco_ray.plan.stages.seed:COST",
        derived=derived.of_seed,
        reads_files=_starts_from_a_model,
        makes_model=lambda config: config.tokens.seed > 0,
        recipe="submodels",
        trains_whole=False,
        per_cluster=False,
        tokens=lambda config: config.tokens.seed,
        members=lambda config: config.seed_members,
        syncs="all",
        keeps_state=lambda config: config.submodels.keep_optimizer_state,
        measures_held_out=True,
        may_adapt=False,
    ),
    Stage(
        "cluster",
        "clusters",
        needs=("corpus", "seed"),
        reads=("clusters", "tokens"),
        place=_where_vectors_are_made,
        work="moedisco_ray.stages.clustering.stage:run",
        cost="moedisco_ray.plan.stages.cluster:COST",
    ),
    Stage(
        "decompose",
        "decomposed",
        needs=("seed", "cluster"),
        reads=(),
        place=_where_a_start_is_cut,
        work="moedisco_ray.stages.decompose:run",
        cost="moedisco_ray.plan.stages.decompose:COST",
        derived=derived.of_decompose,
    ),
    TrainingStage(
        "submodels",
        "submodels",
        needs=("decompose", "cluster"),
        reads=("deterministic", "tokens", "submodels"),
        place=_low_memory,
        work="moedisco_ray.stages.train.submodels:run",
        cost="moedisco_ray.plan.stages.submodels:COST",
        derived=derived.of_submodels,
        recipe="submodels",
        trains_whole=False,
        per_cluster=True,
        tokens=lambda config: config.tokens.submodels,
        members=_one,
        syncs="backbone",
        keeps_state=lambda config: config.finetune.keep_optimizer_state,
        measures_held_out=False,
        may_adapt=True,
    ),
    Stage(
        "merge",
        "merged",
        needs=("decompose", "cluster", "submodels"),
        reads=("merge", "finetune.keep_optimizer_state"),
        place=_with_the_gang,
        work="moedisco_ray.stages.merge.stage:run",
        cost="moedisco_ray.plan.stages.merge:COST",
        makes_model=lambda config: config.tokens.decoupled,
    ),
    TrainingStage(
        "finetune",
        "finetuned",
        needs=("merge",),
        reads=("deterministic", "finetune"),
        place=_with_the_gang,
        work="moedisco_ray.stages.train.finetune:run",
        cost="moedisco_ray.plan.stages.finetune:COST",
        derived=derived.of_finetune,
        makes_model=_always,
        recipe="finetune",
        trains_whole=True,
        per_cluster=False,
        tokens=lambda config: config.tokens.finetune,
        members=_one,
        syncs=None,
        keeps_state=_never,
        measures_held_out=True,
        may_adapt=True,
    ),
    Stage(
        "evaluate",
        "evaluation",
        needs=("finetune",),
        reads=("evaluation.max_tokens", "evaluation.stages", "evaluation.sources", "evaluation.lm_eval"),
        place=_with_the_gang,
        work="moedisco_ray.execution.stage_work:evaluate",
        cost="moedisco_ray.plan.stages.evaluate:COST",
        derived=derived.of_evaluation,
        reads_files=_always,
    ),
    Stage(
        "export",
        "model",
        needs=("finetune", "evaluate"),
        reads=("evaluation.prompts", "export"),
        place=_with_the_gang,
        work="moedisco_ray.stages.export.stage:run",
        cost="moedisco_ray.plan.stages.export:COST",
    ),
)
TRAINING = tuple(stage for stage in STAGES if isinstance(stage, TrainingStage))
"""The stages that train."""
OF_CLUSTERS = frozenset(stage.name for stage in TRAINING if stage.per_cluster)
"""Names of the stages that train a model for each cluster."""
_BY_NAME = {stage.name: stage for stage in STAGES}
_LEAVES = tuple(leaves(RunConfig))


def stage_named(name: str) -> Stage:
    """The stage with a name.

    Raises:
        KeyError: No stage has the name.
    """
    return _BY_NAME[name]


def training_stage(name: TrainingStageName) -> TrainingStage:
    """The stage with a name, which trains models."""
    stage = _BY_NAME[name]
    if not isinstance(stage, TrainingStage):
        raise TypeError(name)
    return stage


def fingerprints(config: RunConfig, inputs: Mapping[str, str] | None = None) -> dict[str, str]:
    """A digest per stage of everything its result depends on: its settings, its upstream stages, and the input files.

    Args:
        config: The run's configuration.
        inputs: Identity of the user's files, by the stage that reads them.

    Raises:
        LookupError: A stage reads files of the user, and its `Stage` does not say so.
    """
    for name in inputs or ():
        if not stage_named(name).reads_files(config):
            raise LookupError(f"stage {name} reads files of the user; set its reads_files in core.stages")
    digests: dict[str, str] = {}
    for stage in STAGES:
        needs = {name: digests[name] for name in stage.needs}
        digests[stage.name] = stage.fingerprint(config, needs, (inputs or {}).get(stage.name, ""))
    return digests


def alike(one: RunConfig, other: RunConfig) -> tuple[str, ...]:
    """Names of the stages with equal fingerprints in two runs, if both read the same files of the user.

    Args:
        one: Configuration of a run, with everything decided that it leaves open (`plan.resolve`).
        other: That of the other run.
    """
    found = fingerprints(other)
    return tuple(name for name, digest in fingerprints(one).items() if found[name] == digest)


def changed_settings(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted paths of the settings that differ between two configurations and can change the result."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    paths = dict.fromkeys(path for stage in STAGES for path in stage.settings)
    changed = [leaf for path in paths for leaf in _differences(_at(before, path), _at(after, path), path)]
    derived = [
        f"{name} of {stage.name}"
        for stage in STAGES
        for name, value in stage.derived(new).items()
        if stage.derived(old).get(name, value) != value
    ]
    return changed + ([] if changed else derived)


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path


def _is_in(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


def _at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
