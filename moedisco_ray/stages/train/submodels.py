"""The sub-models stage: each trains on its own cluster's text, on one low-memory worker."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moedisco_ray.backend import Placement
from moedisco_ray.core.records.summaries import TrainingSummary
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.core.store.manifests import MANIFEST, SYNC, files_in
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.plan.steps import unit_steps
from moedisco_ray.policies.quorum import Quorum
from moedisco_ray.stages.context import COMMON, Context, cluster_tokens, submodel_seed
from moedisco_ray.stages.train.jobs import make_job, restored_optimizer_state, sync_plans, train, unit_records
from moedisco_ray.training import TrainJob, write_partial_result
from moedisco_ray.training.sync.combine import write_common
from moedisco_ray.training.sync.files import history


def run(context: Context, draft: Draft) -> None:
    """Train every sub-model on its cluster's text, the longest first; sync points average their backbones."""
    config = context.config
    if not config.tokens.decoupled:
        draft.summary.update(TrainingSummary(units=[]).to_json())
        return
    steps = unit_steps(config.tokens.submodels, config.submodels.optimizer, cluster_tokens(context))
    owners = {owner.cluster: owner for owner in context.owners}
    jobs = [
        make_job(
            context,
            "submodels",
            f"submodel-{k}",
            model=context.of("decompose") / str(k),
            shards=owners[k].shards if k in owners else context.of("cluster") / "shards" / str(k),
            steps=own,
            seed=submodel_seed(config, k),
            owner=owners.get(k),
        )
        for k, own in enumerate(steps)
    ]
    sync_directory = context.checkpoints("submodels") / SYNC
    # no state of all weights exists
    in_parts = bool(config.submodels.optimizer.block_steps or config.submodels.lora.rank)
    seed_state = (
        restored_optimizer_state(context, "seed") if config.submodels.keep_optimizer_state and not in_parts else None
    )
    plans = sync_plans(steps, config.submodels, sync_directory, context.store)
    # Only the weights of a data owner's sub-model come to the run.
    jobs = [
        dataclasses.replace(
            job,
            sync=plan,
            optimizer_state=seed_state,
            with_optimizer_state=job.owner is None and not in_parts,
            drop_checkpoints=True,
        )
        for job, plan in zip(jobs, plans, strict=True)
    ]
    order = sorted(jobs, key=lambda job: -job.steps)
    quorum = Quorum(config.submodels.quorum)
    done = train(context, order, Placement(config.pools.submodels, 1, config.checkpoint.max_failures), quorum)
    trained = dict(zip((job.name for job in order), done, strict=True))
    for k, job in enumerate(jobs):
        if trained[job.name].contribution != "finished":
            context.call(None, Files(), write_partial_result, job)
        context.store.link(job.output, draft.path / str(k))
    units = unit_records(jobs, [trained[job.name] for job in jobs])
    synced = history(sync_directory, context.store, "submodels")
    left = [each for job in jobs if job.owner is not None for each in _left(context, job, job.owner, synced)]
    draft.summary.update(
        TrainingSummary.model_validate({"units": units, "syncs": synced, **({"left": left} if left else {})}).to_json()
    )
    if synced:
        target = draft.path / COMMON
        context.call(
            None,
            Files((), [target]),
            functools.partial(write_common, store=context.store, stage="submodels"),
            sync_directory,
            len(synced),
            target=target,
        )


def _left(context: Context, job: TrainJob, owner: str, synced: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the training of a data owner's sub-model has brought to the run; see `Departure`."""
    manifest = context.store.manifest(str(context.store.name_of(job.output))) if context.store.is_remote else None
    sizes = (
        {path.name: path.stat().st_size for path in files_in(job.output)}
        if manifest is None
        else {name: entry.size for name, entry in manifest.items()}
    )
    for name in sorted(sizes.keys() - {MANIFEST}):  # it only marks the directory as complete
        yield {"owner": owner, "what": f"{job.name}/{name}", "bytes": sizes[name]}
    for number, sync in enumerate(synced, start=1):
        if job.name in sync.get("bytes", {}):
            yield {
                "owner": owner,
                "what": f"{job.name}: backbone at sync point {number}",
                "bytes": sync["bytes"][job.name],
            }
