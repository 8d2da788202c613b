"""Which steps a run's units trained, attempt by attempt, from their events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import pairwise

from moedisco_ray.core.records.events import Event


@dataclasses.dataclass
class Attempt:
    """What one attempt at a unit trained.

    Attributes:
        start: Steps that were made before it.
        reported: The steps that it reported, counted from 1, in the order of its reports.
        saved: The steps of the checkpoints that it reported, which it does when one is safe.
    """

    start: int
    reported: list[int]
    saved: list[int] = dataclasses.field(default_factory=list)

    @property
    def end(self) -> int:
        """Steps that were made when it was last heard of."""
        return self.reported[-1]

    @property
    def safe(self) -> int:
        """Steps that were known to be safe when it was last heard of."""
        return max((self.start, *self.saved))

    @property
    def in_a_row(self) -> bool:
        """Whether it made one step after the other, and no other attempt made any of the unit's meanwhile."""
        return self.reported == list(range(self.start + 1, self.end + 1))


def attempts(events: Iterable[Event]) -> dict[str, list[Attempt]]:
    """The attempts at each unit that trained something, in their order; for units that report every step."""
    found: dict[str, list[Attempt]] = {}
    fresh: set[str] = set()
    for event in events:
        if event.unit is None:
            continue
        if event.type == "unit_started":
            fresh.add(event.unit)
        elif event.type == "progress":
            step = event.data["step"]
            mine = found.setdefault(event.unit, [])
            if event.unit in fresh:
                fresh.discard(event.unit)
                mine.append(Attempt(step - 1, []))
            mine[-1].reported.append(step)
        elif event.type == "checkpoint" and event.unit in found and event.unit not in fresh:
            found[event.unit][-1].saved.append(event.data["step"])
    return found


def check_losses(unit: Sequence[Attempt], interval: int, *, on_disk: bool) -> None:
    """No attempt lost more than an interval, and the steps made since a checkpoint that was still being written.

    An interval alone is no bound: training does not wait for the write of a checkpoint. A kill one step after a save
    takes this step and the unfinished checkpoint, and with it the whole interval before. If the newest checkpoint was
    complete, less than an interval is lost. On a disk, a write ends within half an interval; on a busy machine it takes
    up to two steps of eight. On any storage the next save waits for it, so that never two intervals are lost.
    """
    for attempt, steps_lost in zip(unit, [*lost(unit), 0], strict=True):
        newest = attempt.end - attempt.end % interval
        assert steps_lost <= attempt.end - attempt.safe
        if attempt.safe < newest:
            assert newest - attempt.safe <= interval
            assert attempt.end - newest <= (interval // 2 if on_disk else interval - 1)


def lost(unit: Sequence[Attempt]) -> list[int]:
    """Steps that each attempt but the first had to make again."""
    return [max(0, earlier.end - later.start) for earlier, later in pairwise(unit)]
