"""What each stage of the pipeline does: reads the artifacts before it, places pure functions on Ray, writes its own."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from moedisco_ray import tasks
from moedisco_ray.artifacts import Draft, read_manifest, write_json
from moedisco_ray.config import CheckpointInit, Evaluation, Model, Pool, RunConfig, Submodels
from moedisco_ray.errors import CorpusError
from moedisco_ray.events import Emit, Event
from moedisco_ray.file_systems import Location, joined
from moedisco_ray.merge import Batch
from moedisco_ray.plan import build_plan
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.policies.rounds import meetings
from moedisco_ray.report import build_report
from moedisco_ray.shell import Placement, Shell, Trained
from moedisco_ray.stages import STAGES
from moedisco_ray.stopping import NEVER, StopFile
from moedisco_ray.tokens import TokenStream, batch_indices
from moedisco_ray.training import BackboneRate, HeldOut, Rounds, TrainJob, steps_for, write_standing
from moedisco_ray.training.rounds import history

P = ParamSpec("P")
T = TypeVar("T")

_CALIBRATION_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Context:
    """What every step is given beside its draft.

    Attributes:
        config: The run's configuration.
        directory: The run directory.
        fingerprint: Of the stage under way.
        emit: Takes events.
        shell: Runs the work.
        stop: Ends the run once it is there.
        own_storage: The run's own folder in `checkpoint.storage`; None: its trainers save in the run directory.
    """

    config: RunConfig
    directory: Path
    fingerprint: str
    emit: Emit
    shell: Shell
    stop: StopFile = NEVER
    own_storage: Location | None = None

    def call(self, pool: Pool | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One pure function on one worker of a pool, metered; None: anywhere, unmetered."""
        return self.shell.call(pool, self.emit, self.stop, function, *args, **kwargs)

    def of(self, stage: str) -> Path:
        """The committed artifact of an earlier stage."""
        return self.directory / next(s.directory for s in STAGES if s.name == stage)

    def checkpoints(self, stage: str) -> Path:
        """Where a stage's trainers keep what they need to go on; another fingerprint never finds it."""
        return self.directory / "checkpoints" / f"{stage}-{self.fingerprint[:12]}"

    def storage(self, stage: str) -> Location:
        """Where they save weights and optimizer: there, or in `checkpoint.storage`."""
        local = self.checkpoints(stage)
        return local if self.own_storage is None else joined(self.own_storage, local.name)

    def summary(self, stage: str) -> dict[str, Any]:
        """The figures of an earlier stage."""
        manifest = read_manifest(self.of(stage))
        return manifest.summary if manifest else {}

    @property
    def start(self) -> tuple[Model, Path, int, int]:
        """What the untrained MoE follows from; see `tasks.initial_moe`."""
        config = self.config
        return config.model, self.of("corpus") / "tokenizer", config.corpus.sequence_length, config.seed

    @property
    def submodels(self) -> list[Path]:
        """The trained sub-models, in the clusters' order; none where their share of the tokens is 0."""
        return [self.of("submodels") / str(k) for k in range(self.config.clusters.count)] if self.config.tokens.decoupled else []

    @property
    def trained_seed(self) -> Path | None:
        """The seed model, where it was trained."""
        return self.of("seed") if self.config.tokens.seed else None


def corpus(context: Context, draft: Draft) -> None:
    """Text to documents, a tokeniser, and packed tokens."""
    draft.summary.update(context.shell.build_corpus(context.config, draft.path))


def seed(context: Context, draft: Draft) -> None:
    """The model that all sub-models start from: trained on everything for the seed share, or as it was initialised."""
    config = context.config
    if not config.tokens.seed:
        if config.tokens.decoupled:
            context.call(None, tasks.write_start, *context.start, config.clusters.count, draft.path)
        return
    start = context.checkpoints("seed") / "start"
    context.call(None, tasks.write_start, *context.start, config.clusters.count, start)
    job = _job(context, "seed", "seed", start, context.of("corpus") / "shards", config.tokens.seed, config.seed)
    trained = _train(context, [job], Placement(config.pools.low_memory, 1, config.submodels.max_failures))
    _link_tree(job.output, draft.path)
    draft.summary["units"] = _units([job], trained)


def cluster(context: Context, draft: Draft) -> None:
    """Documents to clusters, each with its own packed tokens; none where nothing is trained on them."""
    config = context.config
    if not config.tokens.decoupled:
        return
    init = config.model.init
    model = init.checkpoint if isinstance(init, CheckpointInit) else context.of("seed")
    summary = context.shell.build_clusters(config, context.of("corpus"), model, draft.path)
    draft.summary.update(summary)
    context.emit(Event("clusters", "cluster", data={
        "documents": [entry["documents"] for entry in summary["clusters"]],
        "tokens": [entry["tokens"] for entry in summary["clusters"]]}))


def cut(context: Context, draft: Draft) -> None:
    """The MoE to one sub-model per cluster."""
    if context.config.tokens.decoupled:
        draft.summary.update(context.call(
            None, tasks.write_submodels, *context.start, context.config.clusters.count, context.trained_seed, draft.path))


def submodels(context: Context, draft: Draft) -> None:
    """Every sub-model on its own cluster's text, the one with most to do first; they meet where the rounds say so."""
    config = context.config
    draft.summary["units"] = []
    if not config.tokens.decoupled:
        return
    sizes = _cluster_tokens(context)
    jobs = [
        _job(context, "submodels", f"submodel-{k}", context.of("decompose") / str(k), context.of("cluster") / "shards" / str(k),
             config.tokens.submodels * sizes[k] // sum(sizes), _submodel_seed(config, k))
        for k in range(config.clusters.count)
    ]
    rounds = context.checkpoints("submodels") / "rounds"
    jobs = [dataclasses.replace(_anchored(job, config.submodels), rounds=meets)
            for job, meets in zip(jobs, _rounds([job.steps for job in jobs], config.submodels, rounds), strict=True)]
    order = sorted(jobs, key=lambda job: -job.steps)
    quorum = Quorum(config.submodels.quorum, config.submodels.patience)
    done = _train(context, order, Placement(config.pools.low_memory, 1, config.submodels.max_failures), quorum)
    trained = dict(zip((job.name for job in order), done, strict=True))
    for k, job in enumerate(jobs):
        if trained[job.name].contribution != "finished":
            context.call(None, write_standing, job)
        _link_tree(job.output, draft.path / str(k))
    draft.summary["units"] = _units(jobs, [trained[job.name] for job in jobs])
    draft.summary["rounds"] = history(rounds)


def reunite(context: Context, draft: Draft) -> None:
    """Sub-models to the MoE: experts side by side, one backbone, a router.

    Without sub-models it is the initial MoE, with the trained seed in it where there is one (sparse upcycling).
    """
    config = context.config
    pool = config.finetune_pool
    if not config.tokens.decoupled:
        draft.summary.update(context.call(
            pool, tasks.write_whole, *context.start, config.clusters.count, context.trained_seed, _sample(context), config.merge,
            draft.path))
        return
    tokens = [unit["tokens"] for unit in context.summary("submodels")["units"]]
    batches, held_out = _calibration(context)
    draft.summary.update(context.call(
        pool, tasks.merge_submodels, *context.start, context.submodels, context.of("decompose") / "0", tokens, batches, held_out,
        config.merge, draft.path))


def finetune(context: Context, draft: Draft) -> None:
    """The whole MoE on the whole corpus, by the gang of its pool."""
    config = context.config
    pool = config.finetune_pool
    draft.summary["units"] = []
    if not config.tokens.finetune:
        _link_tree(context.of("merge"), draft.path)
        (draft.path / "manifest.json").unlink()     # the merge's own
        return
    job = _job(context, "finetune", "finetune", context.of("merge"), context.of("corpus") / "shards", config.tokens.finetune,
               config.seed + 1 + config.clusters.count)
    trained = context.shell.train_gang(
        job, pool, config.finetune.max_failures, context.checkpoints("finetune") / "ray", context.emit, context.stop)
    _link_tree(job.output, draft.path)
    draft.summary["units"] = _units([job], [trained])


def measure(context: Context, draft: Draft) -> None:
    """Every model of the run on the validation text."""
    config, pool = context.config, context.config.finetune_pool
    made = [*(["seed"] if config.tokens.seed else []), *(["merge"] if config.tokens.decoupled else []), "finetune"]
    result = context.call(
        pool, tasks.measure, {stage: context.of(stage) for stage in made}, context.submodels,
        context.of("corpus"), context.of("cluster") / "cluster_model" if config.tokens.decoupled else None,
        config.corpus.sequence_length, _from_anywhere(config.evaluation), "cuda" if pool.gpu else "cpu")
    write_json(draft.path / "evaluation.json", result)
    draft.summary.update({key: result[key] for key in ("perplexity", "bits_per_byte", "documents", "tokens")})


def publish(context: Context, draft: Draft) -> None:
    """The Hugging Face directory, with a model card."""
    config = context.config
    draft.summary.update(context.call(
        config.finetune_pool, tasks.publish, context.of("finetune"), context.of("corpus") / "tokenizer", draft.path,
        build_report(context.directory, config), config.evaluation.prompts, config.evaluation.sample_tokens, config.seed))


STEPS: Mapping[str, Callable[[Context, Draft], None]] = {
    "corpus": corpus,
    "seed": seed,
    "cluster": cluster,
    "decompose": cut,
    "submodels": submodels,
    "merge": reunite,
    "finetune": finetune,
    "evaluate": measure,
    "export": publish,
}


def _job(context: Context, stage: str, name: str, model: Path, shards: Path, tokens: int, seed: int) -> TrainJob:
    config = context.config
    tuning = config.finetune if stage == "finetune" else None
    section = tuning or config.submodels
    steps = steps_for(tokens, section.optimizer)
    home = context.checkpoints(stage) / name
    return TrainJob(
        stage=stage, name=name, model=model.absolute(), shards=(shards.absolute(),),
        output=(home / "trained").absolute(), checkpoints=joined(context.storage(stage), name, "steps"), steps=steps,
        sequence_length=config.corpus.sequence_length, optimizer=section.optimizer,
        checkpoint_every=config.checkpoint.steps, keep=config.checkpoint.keep,
        load_balance=tuning.load_balance if tuning else 0.0,
        z_loss=tuning.z_loss if tuning else 0.0,
        phases=tuning.phases if tuning else (),
        dense_steps=round(tuning.dense_gate * steps) if tuning else 0,
        spike_guard=tuning.spike_guard if tuning else None,
        least_gain=_least_gain(config) if tuning else None,
        seed=seed, log_every=max(1, steps // 100), logs=(context.directory / "logs").absolute(),
        held_out=_held_out(context, stage),
    )


def _from_anywhere(evaluation: Evaluation) -> Evaluation:
    """With paths that do not depend on where a worker was started."""
    sources = tuple(
        source if "://" in source.path or source.path == "embedded"
        else source.model_copy(update={"path": str(Path(source.path).absolute())}) for source in evaluation.sources)
    return evaluation.model_copy(update={"sources": sources, "lm_eval": tuple(path.absolute() for path in evaluation.lm_eval)})


def _held_out(context: Context, stage: str) -> HeldOut | None:
    """What a look at the held-out loss takes: of models that are trained on everything, where it is asked for."""
    config = context.config
    if config.evaluation.every_tokens is None or stage == "submodels":
        return None
    section = config.finetune if stage == "finetune" else config.submodels
    every = max(1, config.evaluation.every_tokens // section.optimizer.batch_tokens)
    return tasks.held_out(
        context.of("corpus").absolute(), every, config.evaluation.slice_tokens, config.corpus.sequence_length)


def _least_gain(config: RunConfig) -> float | None:
    """`finetune.early_stop` in nats per step: by what the plan says a step costs, which no machine's speed changes."""
    if config.finetune.early_stop is None:
        return None
    cost = next(stage.cost for stage in build_plan(config).stages if stage.stage == "finetune")
    return config.finetune.early_stop * cost.dollars / cost.tokens * config.finetune.optimizer.batch_tokens


def _anchored(job: TrainJob, settings: Submodels) -> TrainJob:
    if settings.backbone_lr_scale == 1:
        return job
    start = math.ceil(settings.backbone_lr_scale_from * job.steps)
    return dataclasses.replace(job, backbone_rate=BackboneRate(settings.backbone_lr_scale, start))


def _rounds(steps: Sequence[int], settings: Submodels, directory: Path) -> list[Rounds | None]:
    """Of each sub-model, by its steps; a phase that is shorter than a round has none."""
    if settings.sync_every is None or len(steps) == 1 or max(steps) <= settings.sync_every:
        return [None] * len(steps)
    return [Rounds(directory.absolute(), at, settings.outer, settings.round_patience)
            for at in meetings(steps, settings.sync_every)]


def _train(context: Context, jobs: Sequence[TrainJob], placement: Placement, quorum: Quorum = ALL) -> list[Trained]:
    return context.shell.train_all(jobs, placement, context.checkpoints(jobs[0].stage) / "ray", context.emit, context.stop, quorum)


def _units(jobs: Sequence[TrainJob], trained: Sequence[Trained]) -> list[dict[str, Any]]:
    return [
        {
            "name": job.name,
            "steps": done.result.steps,
            "planned_steps": job.steps,
            "tokens": done.result.tokens,
            "loss": done.result.loss if done.result.steps else None,
            "seconds": round(done.result.seconds, 3),
            "workers": round(done.workers, 3),
            "held": {key: round(seconds, 3) for key, seconds in done.held.items()},
            "contribution": done.contribution,
            "reason": done.reason,
        }
        for job, done in zip(jobs, trained, strict=True)
    ]


def _calibration(context: Context) -> tuple[list[Batch], list[NDArray[np.int32]]]:
    """Windows of every cluster's text, in proportion to its tokens: to calibrate routers on, and to compare merges on.

    Merges are compared on the windows that come last in their sub-model's own first pass: unless it went through all of
    its text, it has not trained on them. Routers are calibrated on none of these.

    Returns:
        Batches with the number of their cluster; windows [L], empty unless `merge.backbone` is `auto`.

    Raises:
        CorpusError: There is no window to compare merges on.
    """
    config = context.config
    length = config.corpus.sequence_length
    sizes = _cluster_tokens(context)
    batches: list[Batch] = []
    held_out: list[NDArray[np.int32]] = []
    for k, size in enumerate(sizes):
        stream = TokenStream([context.of("cluster") / "shards" / str(k)], length)
        share = size / sum(sizes) / length
        held = 0
        if config.merge.backbone == "auto":
            held = min(len(stream) // 2, max(1, round(config.merge.auto_tokens * share)))
        seen = batch_indices(_submodel_seed(config, k), 0, len(stream), len(stream))
        held_out += [stream.window(int(i))[1:].astype(np.int32) for i in seen[len(stream) - held:]]
        left = np.sort(seen[:len(stream) - held])
        wanted = min(len(left), max(1, round(config.merge.calibration_tokens * share)))
        # Evenly spread over the shard: its beginning alone could be one document.
        chosen = left[np.linspace(0, len(left) - 1, wanted).astype(np.int64)]
        for some in np.array_split(chosen, -(-wanted // _CALIBRATION_BATCH)):
            tokens_BL = np.stack([stream.window(int(i))[:-1] for i in some])
            batches.append((tokens_BL, np.full(len(some), k, dtype=np.int64)))
    if config.merge.backbone == "auto" and not held_out:
        remedy = "the clusters have no window of text to spare for a comparison; choose a rule, or add text"
        raise CorpusError("merge.backbone", "auto", remedy)
    return batches, held_out


def _sample(context: Context) -> list[Batch]:
    """As much of the whole corpus, evenly spread, as routers are calibrated on; all of one cluster."""
    stream = TokenStream([context.of("corpus") / "shards"], context.config.corpus.sequence_length)
    wanted = min(len(stream), max(1, context.config.merge.calibration_tokens // stream.sequence_length))
    chosen = np.linspace(0, len(stream) - 1, wanted).astype(np.int64)
    return [
        (np.stack([stream.window(int(i))[:-1] for i in some]), np.zeros(len(some), dtype=np.int64))
        for some in np.array_split(chosen, -(-wanted // _CALIBRATION_BATCH))]


def _submodel_seed(config: RunConfig, cluster: int) -> int:
    return config.seed + 1 + cluster


def _cluster_tokens(context: Context) -> list[int]:
    return [int(entry["tokens"]) for entry in context.summary("cluster")["clusters"]]


def _link_tree(source: Path, target: Path) -> None:
    """Copy a directory by hard links: the files are final, and the source goes as soon as the copy is committed."""
    shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
