"""Bytes that syncs move through storage. Their arithmetic is negligible: a few additions per parameter and sync."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.config import Submodels
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.policies.sync_points import sync_count

_STORED = {"fp32": 4, "bf16": 2}
_COMMON = 4     # bytes per number of the common backbone and its momentum


class Sync(BaseModel):
    """The syncs of the sub-models."""

    model_config = ConfigDict(frozen=True)

    meetings: int
    bytes: int
    """Bytes written and read, over all syncs and members."""


def plan_sync(settings: Submodels, steps: int, members: int, parameters: Parameters) -> Sync | None:
    """Bytes that the syncs of the sub-models move.

    At a sync each member writes its backbone and reads the common one. The outer step reads all members' backbones, reads the last
    common backbone and its momentum twice each, reads the new momentum, and writes the new backbone and momentum: 7 passes.

    Args:
        settings: The section of the sub-models.
        steps: Steps of one member.
        members: Number of members.
        parameters: Parameters of one member.

    Returns:
        None without syncs.
    """
    meetings = 0 if settings.sync_every is None or members == 1 else sync_count(steps, settings.sync_every)
    if not meetings:
        return None
    backbone = parameters.total - parameters.experts - parameters.router
    each = 2 * _STORED[settings.optimizer.state] + _COMMON
    return Sync(meetings=meetings, bytes=meetings * backbone * (members * each + 7 * _COMMON))
