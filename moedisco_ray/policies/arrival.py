"""When to request the expensive nodes, so that they arrive as the last sub-model ends.

Nodes that arrive too early are paid for while they idle. Nodes that arrive too late cost only time, because the cheap nodes are
released by then; so no safety margin is added to the boot time. Every progress report renews the prediction. If a lost worker
delays the end so much that a second boot is cheaper than the idle time, the nodes are released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from moedisco_ray.policies.ordering import finish_times

Advice = Literal["wait", "ask", "keep", "release"]

ASSUMED_BOOT = 300.0
"""Boot time assumed until one was measured (s): from the request for nodes to their first work."""


def boot_seconds(measured: Sequence[float], nodes: int = 1, assumed: float = ASSUMED_BOOT) -> float:
    """Expected time from the request for a gang of nodes until the gang starts to work, when its last node has arrived (s).

    Args:
        measured: Boot times of single nodes (s), oldest first; the newest 50 count.
        nodes: Number of nodes of the gang.
        assumed: Boot time of a gang without measurements (s).

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
    """Expected time until the last sub-model ends (s).

    Args:
        running: Remaining work of each sub-model that trains (s).
        waiting: Remaining work of each sub-model that waits (s), in order.
        slots: Number of slots of the cheap pool.
        stretch: Factor that allows for lost workers and checkpoints (`checkpointing.expected_stretch`).

    Returns:
        Infinity if a sub-model waits and the pool has no slots.
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
    # Kept nodes idle until the end; released nodes cost one more boot. The factor 2 keeps small changes from restarting them.
    return "release" if seconds_left > 2 * boot else "keep"


def gives_way(asked_for: float, boot: float) -> bool:
    """Whether to stop waiting for requested nodes and to request others.

    Args:
        asked_for: Time since the request, or since the newest node arrived (s).
        boot: Result of `boot_seconds`.
    """
    return asked_for > 2 * boot
