"""What rounds move through storage. Their arithmetic, some additions per parameter and round, is nothing beside a step's."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.config import Submodels
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.policies.sync_points import sync_count

_STORED = {"fp32": 4, "bf16": 2}
_COMMON = 4     # bytes per number of the common backbone and its momentum, whatever the members keep


class Sync(BaseModel):
    """The meetings of a phase."""

    model_config = ConfigDict(frozen=True)

    meetings: int
    bytes: int
    """Written and read, over all meetings and members."""


def plan_sync(settings: Submodels, steps: int, members: int, parameters: Parameters) -> Sync | None:
    """What the rounds of a phase move.

    At a meeting each member writes its backbone and reads the common one. The outer step reads all of the members', the last
    common backbone and its momentum twice each, and the new momentum, which it writes like the new backbone: 7 passes.

    Args:
        settings: The phase's.
        steps: Of one member.
        members: How many.
        parameters: Of one member.

    Returns:
        None where they never meet.
    """
    meetings = 0 if settings.sync_every is None or members == 1 else sync_count(steps, settings.sync_every)
    if not meetings:
        return None
    backbone = parameters.total - parameters.experts - parameters.router
    each = 2 * _STORED[settings.optimizer.state] + _COMMON
    return Sync(meetings=meetings, bytes=meetings * backbone * (members * each + 7 * _COMMON))
