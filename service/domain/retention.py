"""Decides which finished runs are removed and when.

A removal is announced a day ahead. Runs that are marked as kept are never removed, and neither are runs from which
another run starts that has not succeeded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from service.domain.policies import Retention
from service.domain.run_paths import ULID_PATTERN

NOTICE_SECONDS = 24 * 3600.0
"""Minimum time from the announcement to the removal, in seconds."""
_DAY = 24 * 3600.0
_RUN_ID = re.compile(rf"(?<![0-9A-Z]){ULID_PATTERN}(?![0-9A-Z])")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    Attributes:
        ended: End of the run, in seconds since the epoch.
        kept: Whether its owner exempted it from retention.
    """

    run_id: str
    ended: float
    kept: bool = False


@dataclasses.dataclass(frozen=True)
class Due:
    """Time at which retention removes a run, and the rule that decides it."""

    time: float
    why: str


def due_runs(finished: Sequence[FinishedRun], retention: Retention) -> dict[str, Due]:
    """Removal time of each finished run of one owner that a rule removes, set by the rule that removes it first.

    Runs marked as kept are never removed, and do not count among the newest runs.
    """
    newest_first = sorted(
        (run for run in finished if not run.kept), key=lambda run: (run.ended, run.run_id), reverse=True
    )
    due: dict[str, Due] = {}
    for place, run in enumerate(newest_first):
        rules = []
        if retention.days is not None:
            rules.append(Due(run.ended + retention.days * _DAY, f"finished runs are kept for {retention.days:g} days"))
        most = retention.finished_runs
        if most is not None and place >= most:
            # A run is removed once `most` newer runs have finished: it has been due since the last of them ended.
            rules.append(Due(newest_first[place - most].ended, f"the newest {most} finished runs are kept"))
        if rules:
            due[run.run_id] = min(rules, key=lambda rule: rule.time)
    return due


def announced(due: float | None, before: float | None, now: float) -> float | None:
    """Removal time to announce to a run's owner, a day or more after the first announcement; None without a rule."""
    if due is None:
        return None
    notice = now + NOTICE_SECONDS
    return max(due, notice if before is None else min(before, notice))


def named_runs(config: Any) -> set[str]:
    """Ids of the runs that a stored configuration reads, by a path or by `run://`; its `output` is not searched."""
    places = {name: value for name, value in config.items() if name != "output"} if isinstance(config, dict) else config
    return {run_id for text in _texts(places) for run_id in _RUN_ID.findall(text)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)
