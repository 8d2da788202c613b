"""The fine-tune stage: the merged MoE, trained as a whole by a gang of workers."""

from __future__ import annotations

import dataclasses

from moedisco_ray.core.artifacts import Draft
from moedisco_ray.core.records import TrainingSummary
from moedisco_ray.stages.context import Context, finetune_seed
from moedisco_ray.stages.train.jobs import make_job, restored_optimizer_state, unit_records


def run(context: Context, draft: Draft) -> None:
    """Train the whole MoE on the whole corpus, by all workers of its pool together."""
    config = context.config
    pool = config.finetune_pool
    if not config.tokens.finetune:
        draft.summary.update(TrainingSummary(units=[]).to_json())
        context.store.link(context.of("merge"), draft.path)
        return
    blocks = bool(config.finetune.optimizer.block_steps)
    job = make_job(
        context, "finetune", "finetune", model=context.of("merge"), shards=context.of("corpus") / "shards",
        tokens=config.tokens.finetune, seed=finetune_seed(config))
    job = dataclasses.replace(job, optimizer_state=restored_optimizer_state(context, "merge") if not blocks else None)
    trained = context.backend.train_gang(
        job, pool, config.checkpoint.max_failures, context.checkpoints("finetune") / "ray", context.emit, stop=context.stop)
    context.store.link(job.output, draft.path)
    draft.summary.update(TrainingSummary(units=unit_records([job], [trained])).to_json())
