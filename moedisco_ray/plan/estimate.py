"""Planned time and cost of every stage.

The time of a stage is its operations (`plan.cost`) divided by the workers' speed (`plan.speed`), plus start-up times:

* the driver and Ray start once per run;
* a worker process starts with the first of successive stages on its pool, and is kept for the others. Where several
  workers train one model, they start anew for each model, after Ray Train's controller, whose time costs nothing;
* training: `evaluation.every_tokens` adds forward passes that measure the held-out loss; GPU workers, which are at
  different machines, wait for syncs;
* other stages: `plan.stages` has a page of each.

The estimate leaves out k-means and the time to write files and checkpoints. It also leaves out `evaluation.lm_eval`,
because a plan does not read task files: `left_out` names this setting, and the bill is marked as incomplete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import Bill, line, make_bill
from moedisco_ray.core.records.prices import dollars_of
from moedisco_ray.core.stages import STAGES, TrainingStage
from moedisco_ray.plan.cost import Cost, TypeShare
from moedisco_ray.plan.reading import HEAD, Reading, StageEstimate, crowd, priced, total, unknown
from moedisco_ray.plan.speed import Machine, seconds_for, start_up
from moedisco_ray.plan.stage_cost import cost_of

_ROUNDING = 1e-6


class Training(BaseModel, frozen=True, defer_build=True):
    """The facts about a training stage from which its time is estimated."""

    cost: Cost
    units: int
    at_once: int
    """Number of models that train at the same time."""
    workers_per_unit: int
    experts: int
    types: tuple[TypeShare, ...] = ()
    sync_seconds: float = 0.0
    """Time that the syncs take (seconds). Models that take turns on slots hold one for a part of it."""

    @property
    def is_gang(self) -> bool:
        """Whether several workers train one model, which start anew for each; else a pool's processes are kept."""
        return self.workers_per_unit > 1


def estimate_stages(
    config: RunConfig, trainings: Mapping[str, Training], vocab_size: int, machine: Machine
) -> tuple[StageEstimate, ...]:
    """Estimates of all stages, in pipeline order."""
    found: list[StageEstimate] = []
    warm: str | None = None
    for stage in STAGES:
        reading = Reading(config, vocab_size, machine, warm)
        if isinstance(stage, TrainingStage) and stage.name in trainings:
            training = trainings[stage.name]
            found.append(_training(stage, training, reading))
            warm = None if training.is_gang else found[-1].pool
        else:
            found.append(cost_of(stage).estimate(reading))
            warm = warm if found[-1].pool == HEAD else found[-1].pool
    return tuple(found)


def held_out_loss(stage: TrainingStage, tokens: int, reading: Reading) -> float | None:
    """Seconds per worker to measure the held-out loss during a stage and at its end; 0 if it is not measured."""
    config, every = reading.config, reading.config.evaluation.every_tokens
    if every is None or not stage.measures_held_out:
        return 0.0
    # The members of a seed make their steps at the same time.
    batch = stage.section(config).optimizer.batch_tokens * stage.members(config)
    count = -(-tokens // batch // max(1, every // batch))
    return reading.passes(count * config.evaluation.slice_tokens, whole=stage.trains_whole, pool=stage.pool(config))


def planned_bill(config: RunConfig, stages: Sequence[StageEstimate], machine: Machine) -> Bill:
    """The estimated bill of a run, in the same form as the bill of a finished run.

    Args:
        config: The run's configuration.
        stages: Estimates of all stages.
        machine: What is known of the machines.
    """
    return make_bill(
        [each for stage in stages for each in stage.lines],
        seconds=total([start_up(None, machine), *(each.seconds for each in stages)]),
        planned=True,
        complete=not left_out(config),
    )


def no_bill() -> Bill:
    """The bill of a run that does not fit its machines: nothing is known of what it would cost."""
    bare = make_bill((), seconds=None, planned=True, complete=False)
    return bare.model_copy(update={"dollars": None, "dollars_with_idle": None})


def idle_in_nodes(config: RunConfig, stages: Sequence[StageEstimate]) -> float:
    """Dollars of the cards that are idle in nodes of several rented cards while others work; no bill has them."""
    dollars = 0.0
    for stage in stages:
        for each in stage.lines:
            pool = config.pools.at(each.pool)
            node = pool.gpus_per_node
            seconds = (stage.seconds or 0.0) - stage.unbilled_seconds
            if node > 1 and seconds > 0 and each.worker_seconds is not None:
                held = each.worker_seconds / seconds
                idle = math.ceil(held / node - _ROUNDING) * node - held
                dollars += dollars_of(seconds * max(0.0, idle), pool.price_per_hour)
    return dollars


def left_out(config: RunConfig) -> tuple[str, ...]:
    """Settings whose cost a plan does not include."""
    return ("evaluation.lm_eval",) if config.evaluation.lm_eval else ()


def _training(stage: TrainingStage, training: Training, reading: Reading) -> StageEstimate:
    config, machine, name, cost = reading.config, reading.machine, stage.name, training.cost
    pool, measuring = stage.pool(config), held_out_loss(stage, cost.tokens, reading)
    if training.is_gang:
        starting, controller = start_up(pool, machine), start_up(None if not pool.gpu else pool, machine)
        starts, start_per_unit = cost.waves, 1.0
    else:
        starting, controller = reading.starting(pool), 0.0
        starts, start_per_unit = 1, min(1.0, training.at_once / training.units)
    each = cost.flops / cost.tokens
    seconds = seconds_for(pool.node_types[0], machine, cost.flops, each, training.experts)
    if starting is None or controller is None or seconds is None or measuring is None:
        return unknown(name, pool)
    factor = crowd(pool, training.at_once * training.workers_per_unit, machine)
    syncing = training.sync_seconds if pool.gpu else 0.0
    waiting = syncing * training.at_once / training.units
    owners = config.pools.of_owners if stage.per_cluster else ()
    shared = training.units - len(owners)
    working = 3600 * cost.worker_hours if pool.gpu else seconds  # in a mixed pool, each node type has its own speed
    parts = [
        (
            f"{pool.key}.{share.name}",
            share.units,
            3600 * share.worker_hours if pool.gpu else seconds * share.units / training.units,
        )
        for share in training.types
    ] or [(pool.key, shared, working * shared / training.units)]
    owned = working - sum(each for _, _, each in parts)
    parts += [(owner.key, 1, owned / len(owners)) for owner in owners]
    other = start_per_unit * starting + measuring + waiting
    lines = [
        line(name, key, (each + other * units * training.workers_per_unit) * factor, config)
        for key, units, each in parts
        if units
    ]
    wall = 3600 * cost.hours if pool.gpu else cost.waves * seconds / training.units / training.workers_per_unit
    billed = (wall + starts * starting + cost.waves * measuring + syncing) * factor
    return priced(name, pool, billed + cost.waves * controller, lines, cost.waves * controller)
