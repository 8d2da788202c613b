"""Bytes that syncs move through storage. The time to compute a sync is negligible: a few additions per parameter."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.config import Submodels
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.policies.sync_points import sync_count

_STORED = {"fp32": 4, "bf16": 2}
_COMMON = 4     # bytes per element of the common backbone and of its momentum


class Sync(BaseModel):
    """Planned number and data volume of the syncs between sub-models."""

    model_config = ConfigDict(frozen=True)

    syncs: int
    bytes: int
    """Bytes written and read, over all syncs and members."""


def plan_sync(settings: Submodels, steps: int, members: int, parameters: Parameters) -> Sync | None:
    """Plan the syncs of `members` sub-models with `steps` steps each; None if they do not synchronise.

    At a sync each member writes its backbone and reads the common one. The outer step reads all members' backbones. In 7 more
    passes it reads the last common backbone twice, its momentum twice and the new momentum once, and writes the new backbone and
    the new momentum.
    """
    syncs = 0 if settings.sync_every is None or members == 1 else sync_count(steps, settings.sync_every)
    if not syncs:
        return None
    backbone = parameters.total - parameters.experts - parameters.router
    each = 2 * _STORED[settings.optimizer.state] + _COMMON
    return Sync(syncs=syncs, bytes=syncs * backbone * (members * each + 7 * _COMMON))
