"""Bytes that syncs move through storage, and the time for which members wait for them.

The time to compute a sync is negligible: a few additions per parameter. Members write, combine and read in parallel,
each an equal part, so with a slot for each the time does not depend on their number. The driver moves no weights.
"""

from __future__ import annotations

from pydantic import BaseModel

from moedisco_ray.core.config import Pool, Submodels
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.plan.speed import store_bytes_per_second
from moedisco_ray.policies.sync_points import Scope, coded_bytes, sync_count

_STORED = {"fp32": 4, "bf16": 2}
_COMMON = 4  # bytes per element of the common weights, of their momentum, and of a residual


class Sync(BaseModel, frozen=True, defer_build=True):
    """Planned number and data volume of the syncs of a stage's members."""

    syncs: int
    bytes: int
    """Bytes written and read, over all syncs and members."""
    wait_seconds: float
    """Time that all syncs together take over a network (seconds)."""


def plan_sync(
    settings: Submodels,
    pool: Pool,
    steps: int,
    members: int,
    parameters: Parameters,
    *,
    slots: int,
    scope: Scope = "backbone",
) -> Sync | None:
    """Plan the syncs of `members` trainings with `steps` steps or more; None if they do not synchronise.

    At a sync each member writes its weights, reads its range of the weights of all members, which is as much, and reads
    the common weights. All members together read the last common weights and their momentum once, and write the new
    ones once. With `sync_bits` each of these passes of a member moves codes; of the common weights, which a member has
    in memory, the update and the residual of the codes are written too, and the last residual is read; the momentum is
    moved only if the outer step has any. Members that take turns on fewer slots take as many times longer.

    Args:
        settings: Settings of the sub-models, which hold for the seed too.
        pool: Pool of the members.
        steps: Optimizer steps of the member with the fewest.
        members: Number of members.
        slots: Number of slots on which they train.
        parameters: Parameter counts of one member.
        scope: Weights that are exchanged: the backbone of sub-models, or all weights of the seed, whose last sync is
            after the last step.
    """
    if settings.sync_every is None or members == 1:
        return None
    syncs = sync_count(steps, settings.sync_every) + (scope == "all")
    if not syncs:
        return None
    exchanged = parameters.total - (parameters.experts + parameters.router if scope == "backbone" else 0)
    if settings.sync_bits is None:
        member = exchanged * (2 * _STORED[settings.optimizer.state] + _COMMON)
        common = exchanged * 4 * _COMMON
    else:
        member = 3 * coded_bytes(exchanged)
        common = coded_bytes(exchanged) + exchanged * _COMMON * (5 if settings.outer.momentum else 3)
    moved = syncs * (members * member + common)
    return Sync(syncs=syncs, bytes=moved, wait_seconds=moved / (min(slots, members) * store_bytes_per_second(pool)))
