"""Which finished runs are removed, and when: announced a day ahead, never one that is kept or that another run starts from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from service.domain.policies import Retention
from service.domain.run_paths import ULID_PATTERN

NOTICE_SECONDS = 24 * 3600.0
"""Shortest time between the announcement and the removal (s)."""
_DAY = 24 * 3600.0
_RUN_ID = re.compile(rf"(?<![0-9A-Z]){ULID_PATTERN}(?![0-9A-Z])")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    Attributes:
        run_id: The run.
        ended: When, in seconds since the epoch.
        kept: Whether its owner keeps it.
    """

    run_id: str
    ended: float
    kept: bool = False


@dataclasses.dataclass(frozen=True)
class Due:
    """When retention asks for a run to go, and by which rule."""

    time: float
    why: str


def due_runs(finished: Sequence[FinishedRun], retention: Retention) -> dict[str, Due]:
    """When each finished run of one owner is due, by the rule that says so first.

    Kept runs are never due, and do not count among the newest ones.

    Args:
        finished: All finished runs of the owner.
        retention: The rules for the owner.

    Returns:
        By run; a run that no rule ever removes is absent.
    """
    newest_first = sorted((run for run in finished if not run.kept), key=lambda run: (run.ended, run.run_id), reverse=True)
    due: dict[str, Due] = {}
    for place, run in enumerate(newest_first):
        rules = []
        if retention.days is not None:
            rules.append(Due(run.ended + retention.days * _DAY, f"finished runs are kept for {retention.days:g} days"))
        most = retention.finished_runs
        if most is not None and place >= most:
            # Since the run that took its place ended.
            rules.append(Due(newest_first[place - most].ended, f"the newest {most} finished runs are kept"))
        if rules:
            due[run.run_id] = min(rules, key=lambda rule: rule.time)
    return due


def announced(due: float | None, before: float | None, now: float) -> float | None:
    """When a run is removed, at least a day after its first announcement.

    Args:
        due: When the rules ask for it; None: never.
        before: What was announced so far; None: nothing.
        now: Seconds since the epoch.
    """
    if due is None:
        return None
    notice = now + NOTICE_SECONDS
    return max(due, notice if before is None else min(before, notice))


def named_runs(config: Any) -> set[str]:
    """Ids of runs whose directories a stored configuration names, by path or as `run://`; its own output is left out."""
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
