"""Which finished stages of another run a retry may take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal
from urllib.parse import urlsplit

from moedisco_ray.core.records.bill import Bill, sum_dollars
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.locations import Location, is_uri

Reuse = Literal["auto", "parent", "never"]
"""Runs from which a retry takes stages: the existing run and others that the same people see, it alone, or none."""


def usable(agreeing: Sequence[str], finished: Sequence[str]) -> tuple[str, ...]:
    """The stages that agree and are finished, and whose earlier stages all are, too; in pipeline order."""
    found: list[str] = []
    for stage in STAGES:
        if stage.name in agreeing and stage.name in finished and set(stage.earlier) <= set(found):
            found.append(stage.name)
    return tuple(found)


def same_storage(one: Location, other: Location) -> bool:
    """Whether two runs are both in directories, or both at URIs of one bucket, reached in the same way."""
    if not is_uri(one) or not is_uri(other):
        return is_uri(one) == is_uri(other)
    parts = [urlsplit(str(each)) for each in (one, other)]
    return len({(each.scheme, each.netloc, each.query) for each in parts}) == 1


def dollars_without(bill: Bill, stages: Collection[str]) -> float | None:
    """The dollars of a planned bill without some stages; None if they are unknown."""
    if bill.dollars is None:
        return None
    return sum_dollars([line for line in bill.lines if line.stage not in stages]) or 0.0
