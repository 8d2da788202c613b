"""Whether a training on a slow machine should continue elsewhere."""

from __future__ import annotations

_MARGIN = 2.0
"""Factor by which the training must end sooner: speeds vary, and a move costs machine time."""


def worth_moving(steps_left: int, step_seconds: float, usual_seconds: float, restart_seconds: float) -> bool:
    """Whether the remaining steps take far longer here than on a usual slot, a restart included.

    Args:
        steps_left: Steps that the training still has to make.
        step_seconds: Seconds per step here.
        usual_seconds: Seconds per step on a usual slot.
        restart_seconds: Seconds from the end of the last step, through the checkpoint and the restart, to the next
            step.
    """
    return steps_left * step_seconds > _MARGIN * (restart_seconds + steps_left * usual_seconds)
