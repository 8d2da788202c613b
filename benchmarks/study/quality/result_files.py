"""Reads and writes the benchmark's files: raw results, one per (cell, seed), and the published files made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moedisco_ray.core.records import Record

RAW = Path("runs") / "quality" / "results"
"""Default folder of the raw results; git ignores it."""
PUBLISHED = Path(__file__).resolve().parent / "results"
"""Folder of the published files, which git keeps."""
SUMMARY = "summary.json"
CELLS = "cells.jsonl"
CURVES = "curves.jsonl"

AnyRecord = TypeVar("AnyRecord", bound=Record)


def result_paths(folder: Path) -> list[Path]:
    """Paths of the raw results of all measured (cell, seed) pairs."""
    return sorted(path for path in folder.glob("*.json") if path.name != SUMMARY)


def read(path: Path) -> dict[str, Any]:
    """Read a raw result."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def write(path: Path, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Write a raw result or the summary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_lines(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """Read a file with one record per line; empty if the file does not exist."""
    if not path.exists():
        return []
    return [kind.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write a file with one record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{record.model_dump_json(exclude_none=True)}\n" for record in records), encoding="utf-8")


def with_commit(made: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The record of how a result was made, with the commits of earlier rows added.

    Args:
        made: Record from `harness.environment`.
        before: Raw result so far.
    """
    commit = f"{made['commit']}{' with uncommitted changes' if made['dirty'] else ''}"
    return {**made, "commits": list(dict.fromkeys([*before.get("commits", ()), commit]))}


def with_rows(before: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a raw result, with the rows of new arms added.

    Args:
        before: Rows so far; empty at first.
        found: Rows of a comparison, joint training first. Joint training is added only once, but each other row gets its metered
            dollars as `joint_metered_dollars`, because on another day or machine joint training takes another time.
    """
    joint, *others = found
    return [*map(dict, before or [joint]), *({**row, "joint_metered_dollars": joint["metered_dollars"]} for row in others)]
