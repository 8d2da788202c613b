"""Reads and writes the result files: one per (cell, seed), and the summary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SUMMARY = "summary.json"


def result_paths(folder: Path = RESULTS) -> list[Path]:
    """Paths of the result files of all measured (cell, seed) pairs."""
    return sorted(path for path in folder.glob("*.json") if path.name != SUMMARY)


def read(path: Path) -> dict[str, Any]:
    """Read a result file."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def write(path: Path, result: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
    """Write a result file or the summary in their common form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def commits(result: Mapping[str, Any]) -> list[str]:
    """Commits that measured a result's rows, in order; older files name only the last one."""
    return list(result.get("commits", [_last(result)]))


def with_commit(made: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The record of how a result was made, with the commits of earlier rows added.

    Args:
        made: Record from `harness.environment`.
        before: The result file so far; if it has no rows, no commits are added.
    """
    return {**made, "commits": list(dict.fromkeys([*(commits(before) if before["rows"] else []), _last(made)]))}


def with_rows(before: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a result file, with the rows of new arms added.

    Args:
        before: Rows so far; empty at first.
        found: Rows of a comparison, joint training first. Joint training is added only once, but each other row gets its metered
            dollars as `joint_metered_dollars`, because on another day or machine joint training takes another time.
    """
    joint, *others = found
    return [*map(dict, before or [joint]), *({**row, "joint_metered_dollars": joint["metered_dollars"]} for row in others)]


def _last(made: Mapping[str, Any]) -> str:
    return f"{made['commit']}{' with uncommitted changes' if made['dirty'] else ''}"
