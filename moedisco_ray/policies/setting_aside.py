"""When work leaves out a card, or a machine without cards, on which trainings fail again and again.

A card may pass its check and still fail under load: its memory is worn, it overheats, or it falls off the bus. Its slot
is the one that is free, so a training that failed there would start there again until it has no attempt left.

Not every failure on a card is the card's: a training whose data or code is at fault fails at the same step on any card.
So do the trainings that a broken machine ends at their first step, but those are several.
"""

from __future__ import annotations

import dataclasses
import math

FAILURES = 2
"""Failures in a row after which a card is left out: one may be the training's own."""
FIRST_SECONDS = 600.0
"""Seconds for which a card is left out at first. Each further time lasts twice as long."""
MOST_SECONDS = 7200.0
"""Maximum seconds for which a card is left out, since it may cool down or be repaired."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What happened to the trainings on a card.

    Attributes:
        failures: Failures in a row.
        times: Number of times that the card was left out.
        until: Time until which it is left out, in seconds.
        units: Names of the trainings that failed.
    """

    failures: int = 0
    times: int = 0
    until: float = -math.inf
    units: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a seat is.

    Attributes:
        node_id: Id of the node.
        card: Index of the seat's GPU on the node, or indices with commas between them; empty if it holds none.
    """

    node_id: str = ""
    card: str = ""

    def __str__(self) -> str:
        return f"card {self.card} of node {self.node_id}" if self.card else f"node {self.node_id}"

    @property
    def cards(self) -> frozenset[str]:
        """Indices of the seat's GPUs."""
        return frozenset(filter(None, self.card.split(",")))

    def overlaps(self, other: Place) -> bool:
        """Whether two places have a card in common, or are a node without cards."""
        return self.node_id == other.node_id and (self.card == other.card or bool(self.cards & other.cards))


@dataclasses.dataclass(frozen=True)
class Failure:
    """An error that ended a training.

    Attributes:
        step: The step at which it came, counted from 0; None if that is unknown, as for a process that died.
        place: Where it came.
    """

    step: int | None
    place: Place


def is_repeated(before: Failure | None, now: Failure) -> bool:
    """Whether a training failed as it did before on another card."""
    return before is not None and now.step is not None and now.step == before.step and now.place != before.place


def after_failure(record: Record, unit: str, now: float) -> Record:
    """The record after one more failure; once a card was left out, a single further failure leaves it out again."""
    units = record.units | {unit}
    if record.failures + 1 < FAILURES:
        return dataclasses.replace(record, failures=record.failures + 1, units=units)
    seconds = min(MOST_SECONDS, FIRST_SECONDS * 2**record.times)
    return Record(FAILURES - 1, record.times + 1, now + seconds, units)
