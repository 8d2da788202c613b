"""The seed stage: one common dense model, trained on everything, that all sub-models start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from moedisco_ray.backend import Placement
from moedisco_ray.core.artifacts import Draft
from moedisco_ray.core.records import TrainingSummary
from moedisco_ray.core.run_work import Files
from moedisco_ray.stages.context import Context, dense_seed
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.train.jobs import make_job, train, unit_records


def run(context: Context, draft: Draft, *, write_common_start: Callable[..., None]) -> None:
    """Train the seed model for its share of the tokens; at a share of 0, write it untrained, by `write_common_start`."""
    config = context.config
    if not config.tokens.seed:
        if config.tokens.decoupled:
            _write(context, write_common_start, draft.path)
        return
    start = context.checkpoints("seed") / "start"
    _write(context, write_common_start, start)
    job = make_job(
        context, "seed", "seed", model=start, shards=context.of("corpus") / "shards", tokens=config.tokens.seed,
        seed=dense_seed(config))
    job = dataclasses.replace(job, with_optimizer_state=not config.submodels.optimizer.block_steps)
    trained = train(context, [job], Placement(config.pools.low_memory, 1, config.checkpoint.max_failures))
    context.store.link(job.output, draft.path)
    draft.summary.update(TrainingSummary(units=unit_records([job], trained)).to_json())


def _write(context: Context, write_common_start: Callable[..., None], directory: Path) -> None:
    start: Start = context.start
    files = Files([start.tokenizer], [directory])
    context.call(None, files, write_common_start, start, clusters=context.config.clusters.count, directory=directory)
