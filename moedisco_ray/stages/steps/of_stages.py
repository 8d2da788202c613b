"""What each stage of the pipeline does, in pipeline order: read the artifacts before it, place pure functions, write its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from moedisco_ray.backend import Placement
from moedisco_ray.core.artifacts import Draft, write_json
from moedisco_ray.core.config import AnyPool, CheckpointInit, Evaluation
from moedisco_ray.core.events import Event
from moedisco_ray.core.metering import Meter
from moedisco_ray.core.report import build_report
from moedisco_ray.policies.quorum import Quorum
from moedisco_ray.stages import tasks
from moedisco_ray.stages.corpus import Limits
from moedisco_ray.stages.steps.calibration import calibration, sample
from moedisco_ray.stages.steps.context import Context, cluster_tokens, dense_seed, finetune_seed, link_tree, submodel_seed
from moedisco_ray.stages.steps.jobs import anchored, make_job, restored_optimizer_state, rounds_of, train, unit_records
from moedisco_ray.training import write_partial_result
from moedisco_ray.training.sync.exchange import backbone_path, history

_COMMON = "common"
"""Beside the trained sub-models: the backbone that they had in common when they last met."""


def corpus(context: Context, draft: Draft) -> None:
    """Text to documents, a tokeniser, and packed tokens."""
    draft.summary.update(context.backend.build_corpus(context.config, draft.path))
    _warn(context, "corpus", draft.summary["warnings"])


def seed(context: Context, draft: Draft) -> None:
    """The model that all sub-models start from: trained on everything for the seed share, or as it was initialised."""
    config = context.config
    if not config.tokens.seed:
        if config.tokens.decoupled:
            context.call(None, tasks.write_start, *context.start, config.clusters.count, draft.path)
        return
    start = context.checkpoints("seed") / "start"
    context.call(None, tasks.write_start, *context.start, config.clusters.count, start)
    job = make_job(context, "seed", "seed", start, context.of("corpus") / "shards", config.tokens.seed, dense_seed(config))
    job = dataclasses.replace(job, leave_moments=True)
    trained = train(context, [job], Placement(config.pools.low_memory, 1, config.submodels.max_failures))
    link_tree(job.output, draft.path)
    draft.summary["units"] = unit_records([job], trained)


def cluster(context: Context, draft: Draft) -> None:
    """Documents to clusters, each with its own packed tokens; none where nothing is trained on them."""
    config = context.config
    if not config.tokens.decoupled:
        return
    init = config.model.init
    model = init.checkpoint if isinstance(init, CheckpointInit) else context.of("seed")
    meter = Meter()

    def metered(event: Event) -> None:
        meter.update(event)
        context.emit(event)

    summary = context.backend.build_clusters(config, context.of("corpus"), model, draft.path, metered, context.stop)
    draft.summary.update(summary, held=meter.worker_seconds)
    context.emit(Event("clusters", "cluster", data={
        "documents": [entry["documents"] for entry in summary["clusters"]],
        "tokens": [entry["tokens"] for entry in summary["clusters"]]}))
    _warn(context, "cluster", summary["warnings"])


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
    sizes = cluster_tokens(context)
    jobs = [
        make_job(context, "submodels", f"submodel-{k}", context.of("decompose") / str(k), context.of("cluster") / "shards" / str(k),
             config.tokens.submodels * sizes[k] // sum(sizes), submodel_seed(config, k))
        for k in range(config.clusters.count)
    ]
    rounds = context.checkpoints("submodels") / "rounds"
    moments = restored_optimizer_state(context.of("seed")) if config.submodels.keep_moments else None
    jobs = [dataclasses.replace(anchored(job, config.submodels), rounds=meets, moments=moments, leave_moments=True)
            for job, meets in zip(jobs, rounds_of([job.steps for job in jobs], config.submodels, rounds), strict=True)]
    order = sorted(jobs, key=lambda job: -job.steps)
    quorum = Quorum(config.submodels.quorum, config.submodels.patience)
    done = train(context, order, Placement(config.pools.low_memory, 1, config.submodels.max_failures), quorum)
    trained = dict(zip((job.name for job in order), done, strict=True))
    for k, job in enumerate(jobs):
        if trained[job.name].contribution != "finished":
            context.call(None, write_partial_result, job)
        link_tree(job.output, draft.path / str(k))
    draft.summary["units"] = unit_records(jobs, [trained[job.name] for job in jobs])
    draft.summary["rounds"] = history(rounds)
    if draft.summary["rounds"]:
        link_tree(backbone_path(rounds, len(draft.summary["rounds"])), draft.path / _COMMON)


def reunite(context: Context, draft: Draft) -> None:
    """Sub-models to the MoE: experts side by side, one backbone, a router.

    Without sub-models it is the initial MoE, with the trained seed in it where there is one (sparse upcycling).
    """
    config = context.config
    pool = config.finetune_pool
    if not config.tokens.decoupled:
        draft.summary.update(context.call(
            pool, tasks.write_whole, *context.start, config.clusters.count, context.trained_seed, sample(context), config.merge,
            config.finetune.keep_moments, _device(pool), draft.path))
        return
    tokens = [unit["tokens"] for unit in context.summary("submodels")["units"]]
    met = context.of("submodels") / _COMMON
    start = met if met.is_dir() else context.of("decompose") / "0"
    batches, held_out = calibration(context)
    draft.summary.update(context.call(
        pool, tasks.merge_submodels, *context.start, context.submodels, start, tokens, batches, held_out,
        config.merge, config.finetune.keep_moments, _device(pool), draft.path))


def finetune(context: Context, draft: Draft) -> None:
    """The whole MoE on the whole corpus, by the gang of its pool."""
    config = context.config
    pool = config.finetune_pool
    draft.summary["units"] = []
    if not config.tokens.finetune:
        link_tree(context.of("merge"), draft.path)
        (draft.path / "manifest.json").unlink()     # the merge's own
        return
    job = make_job(context, "finetune", "finetune", context.of("merge"), context.of("corpus") / "shards", config.tokens.finetune,
               finetune_seed(config))
    job = dataclasses.replace(job, moments=restored_optimizer_state(context.of("merge")))
    trained = context.backend.train_gang(
        job, pool, config.finetune.max_failures, context.checkpoints("finetune") / "ray", context.emit, context.stop)
    link_tree(job.output, draft.path)
    draft.summary["units"] = unit_records([job], [trained])


def measure(context: Context, draft: Draft) -> None:
    """Every model of the run on the validation text."""
    config, pool = context.config, context.config.finetune_pool
    made = [*(["seed"] if config.tokens.seed else []), *(["merge"] if config.tokens.decoupled else []), "finetune"]
    result = context.call(
        pool, tasks.measure, {stage: context.of(stage) for stage in made}, context.submodels,
        context.of("corpus"), context.of("cluster") / "cluster_model" if config.tokens.decoupled else None,
        Limits(config.corpus.sequence_length, config.corpus.document_tokens), _from_anywhere(config.evaluation), _device(pool))
    draft.summary["extra_seconds"] = round(result.pop("extra_seconds"), 3)
    write_json(draft.path / "evaluation.json", result)
    draft.summary.update({key: result[key] for key in ("perplexity", "bits_per_byte", "documents", "tokens")})


def publish(context: Context, draft: Draft) -> None:
    """The Hugging Face directory, with a model card."""
    config = context.config
    draft.summary.update(context.call(
        config.finetune_pool, tasks.publish, context.of("finetune"), context.of("corpus") / "tokenizer", draft.path,
        build_report(context.directory, config), config.evaluation.prompts, config.evaluation.sample_tokens, config.seed,
        config.model, not config.tokenizer.replace, config.export.dtype))


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


def _warn(context: Context, stage: str, messages: Iterable[str]) -> None:
    for message in messages:
        context.emit(Event("warning", stage, data={"message": message}))


def _device(pool: AnyPool) -> str:
    return "cuda" if pool.gpu else "cpu"


def _from_anywhere(evaluation: Evaluation) -> Evaluation:
    """With paths that do not depend on where a worker was started."""
    sources = tuple(
        source if "://" in source.path or source.path == "embedded"
        else source.model_copy(update={"path": str(Path(source.path).absolute())}) for source in evaluation.sources)
    return evaluation.model_copy(update={"sources": sources, "lm_eval": tuple(path.absolute() for path in evaluation.lm_eval)})
