"""Bytes that syncs move through storage, and the time for which members wait for them.

The time to compute a sync is negligible: a few additions per parameter. Members write and read in parallel. The driver
makes the outer step: it reads the members' weights, and writes the common weights and their momentum.
"""

from __future__ import annotations

from pydantic import BaseModel

from moedisco_ray.core.config import Pool, Submodels
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.plan.speed import store_bytes_per_second
from moedisco_ray.policies.sync_points import Scope, sync_count

_STORED = {"fp32": 4, "bf16": 2}
_COMMON = 4  # bytes per element of the common weights and of their momentum


class Sync(BaseModel, frozen=True):
    """Planned number and data volume of the syncs of a stage's members."""

    syncs: int
    bytes: int
    """Bytes written and read, over all syncs and members."""
    wait_seconds: float
    """Time that all syncs together take over a network (seconds)."""


def plan_sync(
    settings: Submodels, pool: Pool, steps: int, members: int, parameters: Parameters, *, scope: Scope = "backbone"
) -> Sync | None:
    """Plan the syncs of `members` trainings with `steps` steps or more; None if they do not synchronise.

    At a sync each member writes its weights and reads the common ones. The outer step reads the weights of all members.
    In 7 more passes it reads the last common weights twice, their momentum twice and the new momentum once, and writes
    the new weights and the new momentum.

    Args:
        settings: Settings of the sub-models, which hold for the seed too.
        pool: Pool of the members; the head, which makes the outer step, is assumed to reach storage as fast.
        steps: Optimizer steps of the member with the fewest.
        members: Number of members.
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
    stored = _STORED[settings.optimizer.state]
    member = stored + _COMMON  # bytes per element
    over_network = member + members * stored + 2 * _COMMON
    return Sync(
        syncs=syncs,
        bytes=syncs * exchanged * (members * (member + stored) + 7 * _COMMON),
        wait_seconds=syncs * exchanged * over_network / store_bytes_per_second(pool),
    )
