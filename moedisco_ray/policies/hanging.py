"""How long a training may go without a sign of progress until it counts as hung.

Hung work is not dead: its process holds a slot that is paid for, and no error ever comes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LEAST_SECONDS = 120.0
"""Minimum seconds that a step gets, however short the steps are."""
GANG_SECONDS = 600.0
"""Minimum seconds of a gang's step: its collectives have a timeout of 300 s, which must end it first, since the worker
that waits is not the one that hangs."""
STEPS = 20
"""Seconds that a step gets, as a multiple of the median of the last steps."""
LONG_SECONDS = 7200.0
"""Seconds for what has no usual length: loading, the first step of a process, which may compile, checkpoints, and
evaluations."""
SILENT_SECONDS = 120.0
"""Seconds without a message from a process that sends one every few seconds, until it counts as hung: it was stopped,
or swaps."""
START_SECONDS = 600.0
"""Seconds until a process must have sent its first message: it imports torch, perhaps from a slow disk."""


def allowed_seconds(
    step_seconds: Sequence[float], *, in_step: bool, compiles: bool = False, in_gang: bool = False
) -> float:
    """Seconds that a training may take for what it does now.

    Args:
        step_seconds: Durations of the last steps of this process.
        in_step: Whether it computes a step; otherwise it loads, saves or evaluates.
        compiles: Whether a step may have to compile something.
        in_gang: Whether several workers compute the step together.
    """
    usual = STEPS * statistics.median(step_seconds) if step_seconds else 0.0
    is_usual_step = in_step and bool(step_seconds) and not compiles
    least = GANG_SECONDS if in_gang else LEAST_SECONDS
    return max(least if is_usual_step else LONG_SECONDS, usual)
