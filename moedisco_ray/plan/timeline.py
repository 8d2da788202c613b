"""Time of work whose inputs are copied to a card and whose results are copied back while the card computes.

Three engines work at the same time: copies in, arithmetic, and copies out. Each takes the tasks in their order and
handles one at a time. Inputs and results have two places each on the card: the inputs of a task are copied while the
one before computes, into the place of the one before that, and results leave while the next task computes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

PLACES = 2
"""Number of tasks whose inputs, or whose results, are on the card at the same time."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of work of one card.

    Attributes:
        computing: Time of its arithmetic (s).
        copied_in: Size of its inputs (bytes).
        copied_out: Size of its results (bytes).
        after: Number of an earlier task whose results its inputs contain; None: they contain none.
    """

    computing: float
    copied_in: float = 0.0
    copied_out: float = 0.0
    after: int | None = None


@dataclasses.dataclass(frozen=True)
class Link:
    """Speed of the copies between the host's memory and one card (bytes/s).

    Attributes:
        alone: Speed of copies in one direction while there are none in the other.
        both: Speed of each direction while there are copies in both.
    """

    alone: float
    both: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a sequence of tasks takes.

    Attributes:
        seconds: Time until the last result is in the host's memory.
        computing: Part of it in which the card computes (s).
        copied_in: Bytes copied to the card.
        copied_out: Bytes copied to the host.
    """

    seconds: float
    computing: float
    copied_in: float
    copied_out: float


def timeline(tasks: Sequence[Task], link: Link) -> Timeline:
    """The time of tasks in their order, by following the three engines from event to event.

    Raises:
        ValueError: A task contains its own results, or those of a later one.
    """
    if any(task.after is not None and task.after >= number for number, task in enumerate(tasks)):
        raise ValueError("a task must come after those whose results it contains")
    count, now = len(tasks), 0.0
    arrived = computed = left = 0  # tasks that each engine has finished
    remaining = [1.0, 1.0, 1.0]  # share of the task at hand that each engine still has to do
    while left < count:
        waits_for = tasks[arrived].after if arrived < count else None
        active = (
            arrived < min(count, computed + PLACES) and (waits_for is None or left > waits_for),
            computed < min(arrived, left + PLACES),
            left < computed,
        )
        bytes_in = tasks[arrived].copied_in if active[0] else 0.0
        bytes_out = tasks[left].copied_out if active[2] else 0.0
        speed = link.both if bytes_in and bytes_out else link.alone
        whole = (bytes_in / speed, tasks[computed].computing if active[1] else 0.0, bytes_out / speed)
        times = [
            part * each if is_active else math.inf
            for part, each, is_active in zip(remaining, whole, active, strict=True)
        ]
        first = min(times)
        now += first
        ended = [is_active and each <= first for each, is_active in zip(times, active, strict=True)]
        for engine, (each, is_active) in enumerate(zip(whole, active, strict=True)):
            if ended[engine]:
                remaining[engine] = 1.0
            elif is_active:
                remaining[engine] -= first / each
        arrived, computed, left = (done + end for done, end in zip((arrived, computed, left), ended, strict=True))
    return Timeline(
        now,
        sum(task.computing for task in tasks),
        sum(task.copied_in for task in tasks),
        sum(task.copied_out for task in tasks),
    )
