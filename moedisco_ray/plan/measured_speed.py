"""The speed of GPU pools as the trainings of another run have measured it, instead of the assumed one."""

from __future__ import annotations

from moedisco_ray.core.config import AnyPool, LowMemoryPool, RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.run_report import current_report, stored_run_config
from moedisco_ray.core.stages import training_stage
from moedisco_ray.core.store.locations import Location
from moedisco_ray.plan.build import build_plan
from moedisco_ray.plan.cluster_count import with_cluster_count
from moedisco_ray.plan.cost import flops_per_token, optimizer_flops_per_token
from moedisco_ray.plan.parameters import submodel_architecture
from moedisco_ray.plan.stage_plan import StagePlan

_LEAST_COMPUTED = 0.1
"""Smallest share of a measured time that counts as arithmetic, where the network was faster than assumed."""


def with_measured_speed(config: RunConfig, run: Location) -> tuple[RunConfig, tuple[str, ...]]:
    """Take the speed of a configuration's GPU pools from another run.

    Args:
        config: The configuration.
        run: Directory or URI of the other run; it may still be running.

    Returns:
        The configuration with the measured `speed` of each pool, and the names of these pools.

    Raises:
        ConfigError: The run has trained on none of the pools.
        RunDirError: The location holds no run.
    """
    found = measured_speeds(stored_run_config(run), current_report(run))
    pools = {
        name: pool.model_copy(update={"speed": found[name]})
        for name, pool in _measurable(config).items()
        if name in found
    }
    if not pools:
        raise ConfigError(
            "--measured", str(run), "finished no training on a pool that this configuration has: of GPUs of one type"
        )
    return config.model_copy(update={"pools": config.pools.model_copy(update=pools)}), tuple(pools)


def measured_speeds(config: RunConfig, report: RunReport) -> dict[str, float]:
    """The `speed` of each GPU pool with which the run's plan would have stated the time that its trainings took.

    So besides the arithmetic it contains copies of offloaded moments, the stalls for checkpoints, and the exchange of
    data within a fine-tune as far as the arithmetic does not hide it.

    Args:
        config: The run's configuration.
        report: Its report.
    """
    config = with_cluster_count(config)
    pools = _measurable(config)
    trained = {stage.name: stage for stage in report.stages}
    planned, measured = dict.fromkeys(pools, 0.0), dict.fromkeys(pools, 0.0)
    for stage in build_plan(config).stages:
        found = trained.get(stage.stage)
        if stage.pool in pools and found is not None and found.tokens and found.training_worker_seconds:
            waiting = 0.0
            whole = training_stage(stage.stage).trains_whole
            if not whole and stage.traffic is not None:  # the network is as fast whatever the cards are
                steps = found.tokens / config.submodels.optimizer.batch_tokens
                waiting = stage.traffic.seconds * steps * stage.workers
            planned[stage.pool] += _seconds_per_token(config, stage) * found.tokens
            measured[stage.pool] += max(
                found.training_worker_seconds - waiting, _LEAST_COMPUTED * found.training_worker_seconds
            )
    return {name: pool.speed * planned[name] / measured[name] for name, pool in pools.items() if measured[name]}


def _seconds_per_token(config: RunConfig, stage: StagePlan) -> float:
    """Planned worker-seconds per token without what workers wait for exchanges."""
    if stage.traffic is None:
        return 3600 * stage.cost.worker_hours / stage.cost.tokens
    kind = training_stage(stage.stage)
    family, whole = config.model.family_name, config.model.architecture
    shape = whole if kind.trains_whole else submodel_architecture(family, whole, config.cluster_count)
    optimizer = kind.section(config).optimizer if stage.choice is None else stage.choice.optimizer
    recomputes = bool(optimizer.gradient_checkpointing)
    flops = flops_per_token(stage.parameters, shape, config.corpus.sequence_length, checkpointing=recomputes)
    pool = kind.pool(config)
    replicas = 1 if kind.trains_whole else stage.workers
    flops += optimizer_flops_per_token(family, shape, optimizer, pool, replicas=replicas)
    return flops / pool.flops(shape.num_experts)


def _measurable(config: RunConfig) -> dict[str, AnyPool]:
    """The pools whose trainings all ran on GPUs of one type."""
    pools: tuple[AnyPool, ...] = (config.pools.low_memory, config.pools.high_memory)
    return {pool.name: pool for pool in pools if pool.gpu and not (isinstance(pool, LowMemoryPool) and pool.types)}
