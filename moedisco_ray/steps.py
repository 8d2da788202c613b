"""What each stage of the pipeline does: reads the artifacts before it, places pure functions on Ray, writes its own."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moedisco_ray import decompose, evaluate, export, merge
from moedisco_ray.artifacts import Draft, read_json, read_manifest, write_json
from moedisco_ray.config import CheckpointInit, RunConfig
from moedisco_ray.events import Emit, Event
from moedisco_ray.report import build_report
from moedisco_ray.shell import Placement, Shell, Trained
from moedisco_ray.stages import STAGES, Stage
from moedisco_ray.tokens import TokenStream
from moedisco_ray.training import TrainJob, steps_for


@dataclasses.dataclass(frozen=True)
class Context:
    """What every step is given beside its draft.

    Attributes:
        config: The run's configuration.
        directory: The run directory.
        fingerprint: Of the stage under way.
        emit: Takes events.
        shell: Runs the work.
    """

    config: RunConfig
    directory: Path
    fingerprint: str
    emit: Emit
    shell: Shell

    def of(self, stage: str) -> Path:
        """The committed artifact of an earlier stage."""
        return self.directory / next(s.directory for s in STAGES if s.name == stage)

    def checkpoints(self, stage: str) -> Path:
        """Where a stage's trainers keep what they need to go on; another fingerprint never finds it."""
        return self.directory / "checkpoints" / f"{stage}-{self.fingerprint[:12]}"

    def summary(self, stage: str) -> dict[str, Any]:
        """The figures of an earlier stage."""
        manifest = read_manifest(self.of(stage))
        return manifest.summary if manifest else {}

    @property
    def clusters(self) -> range:
        """Numbers of the clusters, and so of the sub-models."""
        return range(self.config.clusters.count)


def corpus(context: Context, draft: Draft) -> None:
    """Text to documents, a tokeniser, and packed tokens."""
    draft.summary.update(context.shell.build_corpus(context.config, draft.path))


def seed(context: Context, draft: Draft) -> None:
    """The model that all sub-models start from: trained on everything for the seed share, or as it was initialised."""
    config = context.config
    start = context.checkpoints("seed") / "start"
    context.shell.call(None, decompose.write_seed, config.model, start, config.clusters.count, _vocabulary(context),
           config.corpus.sequence_length, config.seed)
    if not config.tokens.seed:
        _link_tree(start, draft.path)
        return
    low = config.pools.low_memory
    job = _job(context, "seed", "seed", start, [context.of("corpus") / "shards"], config.tokens.seed)
    trained = _train(context, [job], Placement(low, 1, config.submodels.max_failures))
    _link_tree(job.output, draft.path)
    draft.summary["units"] = _units([job], trained)


def cluster(context: Context, draft: Draft) -> None:
    """Documents to clusters, each with its own packed tokens."""
    config = context.config
    init = config.model.init
    model = init.checkpoint if isinstance(init, CheckpointInit) else context.of("seed")
    summary = context.shell.build_clusters(config, context.of("corpus"), model, draft.path)
    draft.summary.update(summary)
    context.emit(Event("clusters", "cluster", data={"clusters": summary["clusters"]}))


def cut(context: Context, draft: Draft) -> None:
    """The MoE to one sub-model per cluster."""
    config = context.config
    trained_seed = context.of("seed") if config.tokens.seed else None
    draft.summary.update(context.shell.call(
        None, decompose.write_submodels, config.model, draft.path, config.clusters.count, _vocabulary(context),
        config.corpus.sequence_length, config.seed, trained_seed))


def submodels(context: Context, draft: Draft) -> None:
    """Every sub-model on its own cluster's text, independently."""
    config = context.config
    sizes = [entry["tokens"] for entry in context.summary("cluster")["clusters"]]
    jobs = [
        _job(context, "submodels", f"submodel-{k}", context.of("decompose") / str(k), [context.of("cluster") / "shards" / str(k)],
             config.tokens.submodels * sizes[k] // sum(sizes), seed=config.seed + 1 + k)
        for k in context.clusters
    ]
    longest_first = sorted(jobs, key=lambda job: -job.steps)
    trained = dict(zip((job.name for job in longest_first), _train(
        context, longest_first, Placement(config.pools.low_memory, 1, config.submodels.max_failures)), strict=True))
    for k, job in enumerate(jobs):
        _link_tree(job.output, draft.path / str(k))
    draft.summary["units"] = _units(jobs, [trained[job.name] for job in jobs])


def reunite(context: Context, draft: Draft) -> None:
    """Sub-models to the MoE: experts side by side, one backbone, a router."""
    config = context.config
    parts = [context.of("submodels") / str(k) for k in context.clusters]
    tokens = [unit["tokens"] for unit in context.summary("submodels")["units"]]
    sizes = [entry["tokens"] for entry in context.summary("cluster")["clusters"]]
    batches = _calibration(context, sizes)
    report = context.shell.call(
        config.pools.high_memory, merge.build_merged, config.model.family, parts, draft.path, config.merge, tokens, batches,
        _moe_config(context), config.seed)
    write_json(draft.path / "merge.json", report)
    draft.summary.update(router=report["router"], tensors=len(report["tensors"]), backbone_spread=report["backbone_spread"])


def finetune(context: Context, draft: Draft) -> None:
    """The whole MoE on the whole corpus, by the gang of the high-memory pool."""
    config = context.config
    high = config.pools.high_memory
    job = _job(context, "finetune", "finetune", context.of("merge"), [context.of("corpus") / "shards"], config.tokens.finetune,
               seed=config.seed + 1 + config.clusters.count)
    trained = _train(context, [job], Placement(high, high.workers, config.finetune.max_failures))
    _link_tree(job.output, draft.path)
    draft.summary["units"] = _units([job], trained)


def measure(context: Context, draft: Draft) -> None:
    """Every model of the run on the validation text."""
    config = context.config
    result = context.shell.call(
        config.pools.high_memory, evaluate.evaluate_run, context.directory, config.clusters.count,
        bool(config.tokens.seed), config.corpus.sequence_length, config.evaluation.max_tokens,
        "cuda" if config.pools.high_memory.gpu else "cpu")
    write_json(draft.path / "evaluation.json", result)
    draft.summary.update(result)


def publish(context: Context, draft: Draft) -> None:
    """The Hugging Face directory, with a model card."""
    config = context.config
    report = build_report(context.directory, config)
    draft.summary.update(context.shell.call(
        config.pools.high_memory, export.export, context.of("finetune"), context.of("corpus") / "tokenizer", draft.path, report,
        config.evaluation.prompts, config.evaluation.sample_tokens, config.seed))


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


def _job(context: Context, stage: str, name: str, model: Path, shards: Sequence[Path], tokens: int, seed: int | None = None) -> TrainJob:
    config = context.config
    section = config.finetune if stage == "finetune" else config.submodels
    steps = steps_for(tokens, section.optimizer)
    home = context.checkpoints(stage) / name
    return TrainJob(
        stage=stage, name=name, model=model.absolute(), shards=tuple(path.absolute() for path in shards),
        output=(home / "trained").absolute(), checkpoints=(home / "steps").absolute(), steps=steps,
        sequence_length=config.corpus.sequence_length, optimizer=section.optimizer,
        checkpoint_every=config.checkpoint.interval(steps), keep=config.checkpoint.keep,
        load_balance=config.finetune.load_balance if stage == "finetune" else 0.0,
        z_loss=config.finetune.z_loss if stage == "finetune" else 0.0,
        seed=config.seed if seed is None else seed, log_every=max(1, steps // 100),
    )


def _train(context: Context, jobs: Sequence[TrainJob], placement: Placement) -> list[Trained]:
    return context.shell.train_all(jobs, placement, context.checkpoints(jobs[0].stage) / "ray", context.emit)


def _units(jobs: Sequence[TrainJob], trained: Sequence[Trained]) -> list[dict[str, Any]]:
    return [
        {
            "name": job.name,
            "steps": done.result.steps,
            "tokens": done.result.tokens,
            "loss": done.result.loss,
            "seconds": round(done.result.seconds, 3),
            "worker_seconds": round(done.worker_seconds, 3),
        }
        for job, done in zip(jobs, trained, strict=True)
    ]


def _calibration(context: Context, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Windows of every cluster's text, in proportion to its tokens: tokens_NL and the cluster of each, labels_N."""
    config = context.config
    length = config.corpus.sequence_length
    budget = max(context.config.clusters.count, config.merge.calibration_tokens // length)
    tokens, labels = [], []
    for k in context.clusters:
        stream = TokenStream([context.of("cluster") / "shards" / str(k)], length)
        wanted = min(len(stream), max(1, round(budget * sizes[k] / sum(sizes))))
        # Evenly spread over the shard: its beginning alone could be one document.
        chosen = np.linspace(0, len(stream) - 1, wanted).astype(np.int64)
        tokens += [stream.window(int(i))[:-1] for i in chosen]
        labels += [k] * wanted
    return np.stack(tokens), np.asarray(labels)


def _vocabulary(context: Context) -> int:
    return int(context.summary("corpus")["vocab_size"])


def _link_tree(source: Path, target: Path) -> None:
    """Copy a directory by hard links: the files are final, and the source goes as soon as the copy is committed."""
    shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
