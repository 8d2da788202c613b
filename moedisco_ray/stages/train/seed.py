"""The seed stage: one common model of the sub-models' shape, trained on everything, that all sub-models start from.

Several members train it at the same time, each with one worker: every member takes its share of one common data order,
and they combine all weights at sync points (local SGD, DiLoCo). The last sync point is after the last step, so all
members end with the same model. A member that is late at a sync point loads the common weights and continues from
there; if the last sync point is complete, it has the common model and is finished.

With one member, the seed is an ordinary training, by one worker or by a gang of replicas that exchange gradients in
every step (`pools.low_memory.seed_workers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.records.summaries import TrainingSummary
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.core.store.manifests import SYNC
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.plan import planned_vocab_size
from moedisco_ray.plan.seed_workers import seed_workers
from moedisco_ray.plan.steps import unit_steps
from moedisco_ray.policies.parallel import Sharing
from moedisco_ray.stages.context import Context, dense_seed
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.train.jobs import make_job, seed_sync_plans, train, unit_records
from moedisco_ray.training import DataShare, TrainJob
from moedisco_ray.training.sync.files import history


def run(context: Context, draft: Draft, *, write_common_start: Callable[..., None]) -> None:
    """Train the seed model for its share of the tokens; at a share of 0, `write_common_start` writes it untrained."""
    config = context.config
    if not config.tokens.seed:
        if config.tokens.decoupled:
            _write(context, write_common_start, draft.path)
        return
    start = context.checkpoints("seed") / "start"
    _write(context, write_common_start, start)
    sync_directory = context.checkpoints("seed") / SYNC
    jobs = _jobs(context, start, sync_directory)
    trained = _train(context, jobs)
    context.store.link(jobs[0].output, draft.path)
    units, synced = unit_records(jobs, trained), history(sync_directory, context.store, "seed")
    draft.summary.update(
        TrainingSummary.model_validate({"units": units, **({"syncs": synced} if synced else {})}).to_json()
    )


def _train(context: Context, jobs: list[TrainJob]) -> list[Trained]:
    config, low = context.config, context.config.pools.low_memory
    fewest, most = seed_workers(config, planned_vocab_size(config))
    if most == 1:
        return train(context, jobs, Placement(low, 1, config.checkpoint.max_failures))
    # Each worker has a whole replica, so that only gradients cross the network, once per step.
    sharing = Sharing(config.model.architecture.num_experts // config.cluster_count, expert=1, replicate=most)
    [job] = (dataclasses.replace(job, exchange="step", sharing=sharing) for job in jobs)
    return [
        context.backend.train_gang(
            job,
            low.gang(fewest, most),
            config.checkpoint.max_failures,
            context.checkpoints("seed") / "ray",
            context.emit,
            stop=context.stop,
        )
    ]


def _jobs(context: Context, start: Path, sync_directory: Path) -> list[TrainJob]:
    """One job per member. Only the first one measures the held-out loss and writes its optimizer state."""
    config, members = context.config, context.config.seed_members
    names = ["seed"] if members == 1 else [f"seed-{k}" for k in range(members)]
    # Members with one step more come first, so together the members take the first batches of the common order, each
    # once.
    steps = unit_steps(config.tokens.seed, config.submodels.optimizer, [1] * members)
    jobs = [
        make_job(
            context,
            "seed",
            name,
            model=start,
            shards=context.of("corpus") / "shards",
            steps=own,
            seed=dense_seed(config),
        )
        for name, own in zip(names, steps, strict=True)
    ]
    plans = seed_sync_plans(steps, config.submodels, sync_directory, context.store)
    return [
        dataclasses.replace(
            job,
            share=DataShare(k, members, sum(steps)),
            sync=plan,
            held_out=None if k else job.held_out,
            drop_checkpoints=members > 1,
            with_optimizer_state=not k and not config.submodels.optimizer.block_steps,
        )
        for k, (job, plan) in enumerate(zip(jobs, plans, strict=True))
    ]


def _write(context: Context, write_common_start: Callable[..., None], directory: Path) -> None:
    start: Start = context.start
    files = Files([start.tokenizer], [directory])
    context.call(None, files, write_common_start, start, clusters=context.config.cluster_count, directory=directory)
