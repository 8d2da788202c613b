"""Just in time: when to ask for the expensive nodes, so that they arrive as the last sub-model ends.

Asked for too early they are paid for while they idle; too late, the run waits, which costs nothing but time since the
cheap nodes are gone by then. So no safety margin is added to the boot time. The prediction is made anew with every
progress report; where a loss moves the end so far away that starting other nodes later is cheaper than to let these idle,
they are let go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from moedisco_ray.policies.ordering import finish_times

Advice = Literal["wait", "ask", "keep", "release"]

ASSUMED_BOOT = 300.0
"""Seconds from asking for nodes to their first work, until that is measured."""


def boot_seconds(measured: Sequence[float], nodes: int = 1, assumed: float = ASSUMED_BOOT) -> float:
    """What a gang is expected to take from being asked for to its first work, which is when its last node is there.

    Args:
        measured: What single nodes took, oldest first; the newest fifty count.
        nodes: Of the gang.
        assumed: Of a gang, until anything is measured.

    Returns:
        The median of the slowest of `nodes` such times, which is their quantile at 0.5 to the power of 1/nodes.
    """
    if not measured:
        return assumed
    newest = sorted(measured[-50:])
    place = 0.5 ** (1 / nodes) * (len(newest) - 1)
    below = math.floor(place)
    above = min(below + 1, len(newest) - 1)
    return newest[below] + (newest[above] - newest[below]) * (place - below)


def ends_in(running: Sequence[float], waiting: Sequence[float], slots: int, stretch: float = 1.0) -> float:
    """Seconds until the last sub-model ends.

    Args:
        running: Seconds of work left of those that train.
        waiting: The same of those that wait, in their order.
        slots: Slots of the cheap pool.
        stretch: What losses and checkpoints add, as a factor; see `checkpointing.expected_stretch`.

    Returns:
        Infinity where something waits for a pool without slots.
    """
    if waiting and slots < 1:
        return math.inf
    return stretch * max(finish_times(running, waiting, slots), default=0.0)


def advise(seconds_left: float, boot: float, *, asked: bool) -> Advice:
    """What to do about the expensive nodes now.

    Args:
        seconds_left: By `ends_in`.
        boot: By `boot_seconds`.
        asked: Whether they are asked for, or there.
    """
    if not asked:
        return "ask" if seconds_left <= boot else "wait"
    # Kept, they idle for what is left; let go, one more boot is paid. Twice that, or a small change would start them anew.
    return "release" if seconds_left > 2 * boot else "keep"


def gives_way(asked_for: float, boot: float) -> bool:
    """Whether nodes that did not come for so many seconds are not to be had now, so that others are to be asked for.

    Args:
        asked_for: Seconds since they were asked for, or since the newest of them came.
        boot: By `boot_seconds`.
    """
    return asked_for > 2 * boot
