"""The result files: one per (cell, seed), and what is summed up of all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SUMMARY = "summary.json"


def result_paths(folder: Path = RESULTS) -> list[Path]:
    """Of every (cell, seed) that was measured."""
    return sorted(path for path in folder.glob("*.json") if path.name != SUMMARY)


def read(path: Path) -> dict[str, Any]:
    """One of them."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def write(path: Path, result: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
    """In the form that all have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def commits(result: Mapping[str, Any]) -> list[str]:
    """Those that measured its rows, in order; a file of before all were kept names its last one."""
    return list(result.get("commits", [_last(result)]))


def with_commit(made: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """How a result was made, with the commits of rows that were there before it.

    Args:
        made: The record of `harness.environment`.
        before: The result file so far; one without rows was not made by any.
    """
    return {**made, "commits": list(dict.fromkeys([*(commits(before) if before["rows"] else []), _last(made)]))}


def with_rows(before: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A result file's rows and those of arms that it did not have.

    Args:
        before: The rows so far; none at first.
        found: A comparison's, joint training's first. It is added to no other, and its metered dollars go with each of the rest as
            `joint_metered_dollars`: arms may be added on another day and machine, where joint training takes another time.
    """
    joint, *others = found
    return [*map(dict, before or [joint]), *({**row, "joint_metered_dollars": joint["metered_dollars"]} for row in others)]


def _last(made: Mapping[str, Any]) -> str:
    return f"{made['commit']}{' with uncommitted changes' if made['dirty'] else ''}"
