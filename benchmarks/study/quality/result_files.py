"""Reads and writes the benchmark's files: raw results, one per (cell, seed), and the published files made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from benchmarks.study.quality.records import CellResult
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
    return sorted(folder.glob("*.json"))


def read(path: Path) -> CellResult:
    """Read a raw result."""
    return CellResult.model_validate_json(path.read_text(encoding="utf-8"))


def write(path: Path, content: object) -> None:
    """Write a raw result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_entries(path: Path, entries: Iterable[object]) -> None:
    """Write a JSON list with one entry per line."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")


def read_lines(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """Read a file with one record per line; empty if the file does not exist."""
    if not path.exists():
        return []
    return [kind.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write a file with one record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{record.model_dump_json(exclude_none=True)}\n" for record in records), encoding="utf-8")
