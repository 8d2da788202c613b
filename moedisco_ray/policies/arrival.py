"""When to request the expensive nodes, so that they arrive as the last sub-model ends.

Nodes that arrive too early are paid for while they idle. Nodes that arrive too late cost only time, because the cheap
nodes are released by then; so no safety margin is added to the boot time. Every progress report renews the prediction.
If a lost worker delays the end so much that a second boot is cheaper than the idle time, the nodes are released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from moedisco_ray.policies.ordering import finish_times

Advice = Literal["wait", "ask", "keep", "release"]

ASSUMED_BOOT = 300.0
"""Boot time in seconds that is assumed until one was measured: from the request for nodes until they start to work."""


def boot_seconds(measured: Sequence[float], nodes: int = 1, assumed: float = ASSUMED_BOOT) -> float:
    """Expected seconds from the request for a gang of nodes until its last node has arrived and the gang can start.

    Args:
        measured: Boot times of single nodes in seconds, oldest first; only the newest 50 are used.
        nodes: Number of nodes of the gang.
        assumed: Boot time in seconds to return if nothing was measured.

    Returns:
        The median of the longest of `nodes` boot times, which is the quantile of single boot times at 0.5^(1/nodes).
    """
    if not measured:
        return assumed
    newest = sorted(measured[-50:])
    place = 0.5 ** (1 / nodes) * (len(newest) - 1)
    below = math.floor(place)
    above = min(below + 1, len(newest) - 1)
    return newest[below] + (newest[above] - newest[below]) * (place - below)


def ends_in(running: Sequence[float], waiting: Sequence[float], slots: int, stretch: float = 1.0) -> float:
    """Expected time in seconds until the training of the last sub-model ends.

    Args:
        running: Remaining seconds of each sub-model that trains.
        waiting: Remaining seconds of each sub-model that waits for a slot, in the order in which they start.
        slots: Number of slots of the cheap pool.
        stretch: Factor that allows for lost workers and checkpoints (`checkpointing.expected_stretch`).

    Returns:
        The time; infinity if a sub-model waits and the pool has no slots.
    """
    if waiting and slots < 1:
        return math.inf
    return stretch * max(finish_times(running, waiting, slots), default=0.0)


def advise(seconds_left: float, boot: float, *, asked: bool) -> Advice:
    """The next action for the expensive nodes.

    Args:
        seconds_left: Result of `ends_in`.
        boot: Result of `boot_seconds`.
        asked: Whether the nodes are requested or running.
    """
    if not asked:
        return "ask" if seconds_left <= boot else "wait"
    # Nodes that are kept idle until the sub-models end; nodes that are released must boot once more. Because of the
    # factor 2, small changes of the prediction do not restart nodes.
    return "release" if seconds_left > 2 * boot else "keep"


def gives_way(asked_for: float, boot: float) -> bool:
    """Whether to stop waiting for requested nodes and to request others.

    Args:
        asked_for: Seconds since the request, or since the newest node arrived.
        boot: Result of `boot_seconds`.
    """
    return asked_for > 2 * boot
