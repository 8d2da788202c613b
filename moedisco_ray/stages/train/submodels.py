"""The sub-models stage: each trains on its own cluster's text, on one low-memory worker."""

from __future__ import annotations

import dataclasses

from moedisco_ray.backend import Placement
from moedisco_ray.core.artifacts import Draft
from moedisco_ray.core.records import TrainingSummary
from moedisco_ray.core.run_work import Files
from moedisco_ray.policies.quorum import Quorum
from moedisco_ray.stages.context import COMMON, Context, cluster_tokens, submodel_seed
from moedisco_ray.stages.train.jobs import make_job, restored_optimizer_state, sync_plans, train, unit_records
from moedisco_ray.training import write_partial_result
from moedisco_ray.training.sync.exchange import backbone_directory, history


def run(context: Context, draft: Draft) -> None:
    """Train every sub-model on its own cluster's text, the longest first; their backbones are averaged at the sync points."""
    config = context.config
    if not config.tokens.decoupled:
        draft.summary.update(TrainingSummary(units=[]).to_json())
        return
    sizes = cluster_tokens(context)
    jobs = [
        make_job(
            context, "submodels", f"submodel-{k}", model=context.of("decompose") / str(k),
            shards=context.of("cluster") / "shards" / str(k), tokens=config.tokens.submodels * sizes[k] // sum(sizes),
            seed=submodel_seed(config, k))
        for k in range(config.clusters.count)
    ]
    sync_directory = context.checkpoints("submodels") / "sync"
    blocks = bool(config.submodels.optimizer.block_steps)
    seed_state = restored_optimizer_state(context, "seed") if config.submodels.keep_optimizer_state and not blocks else None
    plans = sync_plans([job.steps for job in jobs], config.submodels, sync_directory, context.store)
    jobs = [dataclasses.replace(job, sync=plan, optimizer_state=seed_state, with_optimizer_state=not blocks, drop_checkpoints=True)
            for job, plan in zip(jobs, plans, strict=True)]
    order = sorted(jobs, key=lambda job: -job.steps)
    quorum = Quorum(config.submodels.quorum)
    done = train(context, order, Placement(config.pools.low_memory, 1, config.checkpoint.max_failures), quorum)
    trained = dict(zip((job.name for job in order), done, strict=True))
    for k, job in enumerate(jobs):
        if trained[job.name].contribution != "finished":
            context.call(None, Files(), write_partial_result, job)
        context.store.link(job.output, draft.path / str(k))
    units, synced = unit_records(jobs, [trained[job.name] for job in jobs]), history(sync_directory)
    draft.summary.update(TrainingSummary.model_validate({"units": units, "syncs": synced}).to_json())
    if synced:
        context.store.link(backbone_directory(sync_directory, len(synced)), draft.path / COMMON)
