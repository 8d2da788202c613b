"""The fine-tune stage: the merged MoE, trained as a whole by a gang of workers."""

from __future__ import annotations

import dataclasses
import functools

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.summaries import TrainingSummary
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.plan.gang_traffic import planned_layout
from moedisco_ray.plan.memory import GIB, exchange_of
from moedisco_ray.plan.steps import unit_steps
from moedisco_ray.plan.streamed_way import model_memory, on_cards
from moedisco_ray.policies.parallel import Sharing
from moedisco_ray.stages.context import Context, finetune_seed
from moedisco_ray.stages.train.jobs import make_job, restored_optimizer_state, unit_records
from moedisco_ray.training import TrainJob


def run(context: Context, draft: Draft) -> None:
    """Train the whole MoE on the whole corpus, by all workers of its pool together."""
    config = context.config
    pool = config.finetune_pool
    if not config.tokens.finetune:
        draft.summary.update(TrainingSummary(units=[]).to_json())
        context.store.link(context.of("merge"), draft.path)
        return
    in_parts = bool(config.finetune.optimizer.block_steps or config.finetune.lora.rank)
    state = None if in_parts else restored_optimizer_state(context, "merge")
    job = dataclasses.replace(_distributed(job_of(context), config), optimizer_state=state)
    trained = context.backend.train_gang(
        job,
        pool,
        config.checkpoint.max_failures,
        context.checkpoints("finetune") / "ray",
        context.emit,
        stop=context.stop,
    )
    context.store.link(job.output, draft.path)
    draft.summary.update(TrainingSummary(units=unit_records([job], [trained])).to_json())


def job_of(context: Context) -> TrainJob:
    """The fine-tune of a run as one worker would train it."""
    config = context.config
    [steps] = unit_steps(config.tokens.finetune, config.finetune.optimizer)
    return make_job(
        context,
        "finetune",
        "finetune",
        model=context.of("merge"),
        shards=context.of("corpus") / "shards",
        steps=steps,
        seed=finetune_seed(config),
    )


def _distributed(job: TrainJob, config: RunConfig) -> TrainJob:
    """A copy of the job for a gang: with its interval of exchange, and the division of the model among workers."""
    if job.memory == "streamed":  # one worker drives all cards
        optimizer = on_cards(job.optimizer, config.finetune_pool, job.sequence_length)
        return dataclasses.replace(job, optimizer=optimizer)
    pool, parallel = config.finetune_pool, config.finetune.parallel
    pool_gb = min(kind.memory_gb for kind in pool.node_types)
    measure = functools.partial(
        model_memory,
        job.memory,
        job.model,
        config.model.family_name,
        job.optimizer,
        sequence_length=job.sequence_length,
        gpu=pool.gpu,
        lora=job.lora,
    )

    def fits(shards: int) -> bool:
        return measure(workers=shards).total <= pool_gb * GIB

    layout = planned_layout(config, pool, job.optimizer, pool.fewest_workers, fits)
    exchange = exchange_of(lambda each: measure(workers=pool.fewest_workers, exchange=each, layout=layout), pool_gb)
    fitting = (n for n in range(1, pool.most_workers) if measure(workers=n, exchange=exchange).total <= pool_gb * GIB)
    sharing = Sharing(
        config.model.architecture.num_experts,
        parallel.expert,
        parallel.replicate,
        fewest_shards=next(fitting, pool.most_workers),
        whole_experts=job.optimizer.name == "muon",
    )
    return dataclasses.replace(job, exchange=exchange, sharing=sharing)
