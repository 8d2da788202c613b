"""The files of the grid: a raw result per piece, and the published files that are made from them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.study.grid.records import Entry, PieceResult, TunedArm
from benchmarks.study.grid.summary import summarise
from moedisco_ray.core.records.summaries import Record
from moedisco_ray.core.store.artifacts import write_json, write_text

PUBLISHED = Path(__file__).resolve().parent / "results"
"""Folder of the published results, which git keeps."""
PIECES, TUNED, SUMMARY = "pieces.jsonl", "tuned.jsonl", "summary.json"

_DECIMALS = 6
"""Decimals of the numbers in the summary; pieces have all."""
_IN_PARTS = frozenset({"made", "recipe"})
"""Fields whose entries are published only where they differ from the line before."""
_LEFT_OUT = "left_out"
"""Entries of these fields that the line before has and this one has not."""
Result = TypeVar("Result", bound=PieceResult | TunedArm)


def write(path: Path, result: Record) -> None:
    """Write a raw result atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result.model_dump(mode="json"))


def read_pieces(folder: Path) -> list[PieceResult]:
    """The raw results of all measured pieces."""
    return [read_piece(path) for path in sorted(folder.glob("report-*.json"))]


def read_piece(path: Path) -> PieceResult:
    """The raw result of a measured piece."""
    return PieceResult.model_validate_json(path.read_text(encoding="utf-8"))


def read_tuned(folder: Path) -> list[TunedArm]:
    """The raw results of all sweeps."""
    return [
        TunedArm.model_validate_json(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("tune-*.json"))
    ]


def publish(raw: Path, folder: Path) -> None:
    """Add the raw results to the published files, and write the summary anew.

    A piece or a sweep without a raw result stays as it was published. A piece from before its sweep becomes a tuned one
    if the sweep chose its values.

    Args:
        raw: Folder of the raw results.
        folder: Folder of the published files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tuned = _merged(published_tuned(folder), read_tuned(raw))
    found = _merged(published(folder), read_pieces(raw))
    pieces = {key: _with_sweep(piece, tuned.values()) for key, piece in found.items()}
    if pieces:
        _write_pieces(folder / PIECES, pieces.values())
    if tuned:
        write_text(folder / TUNED, "".join(f"{record.model_dump_json()}\n" for record in tuned.values()))
    fields = set(Entry.model_fields)
    dumped = (each.model_dump_json(include=fields) for each in summarise(list(pieces.values())))
    entries = [
        json.dumps(json.loads(entry, parse_float=lambda number: round(float(number), _DECIMALS))) for entry in dumped
    ]
    write_text(folder / SUMMARY, "[\n" + ",\n".join(entries) + "\n]\n")


def published_tuned(folder: Path) -> list[TunedArm]:
    """The published results of sweeps; empty if there are none."""
    path = folder / TUNED
    return (
        [TunedArm.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def published(folder: Path) -> list[PieceResult]:
    """The published pieces; empty if there are none. A line holds what differs from the line before."""
    path, found = folder / PIECES, []
    before: dict[str, Any] = {name: {} for name in _IN_PARTS}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        now = json.loads(line)
        left_out = set(now.pop(_LEFT_OUT, ()))
        parts = {part: {**before[part], **now.get(part, {})} for part in _IN_PARTS}
        before = {**before, **now, **{part: _without(values, left_out) for part, values in parts.items()}}
        found.append(PieceResult.model_validate(before))
    return found


def _without(values: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _write_pieces(path: Path, pieces: Iterable[PieceResult]) -> None:
    """Write one piece per line, without what the line before says too: seeds of one arm share their recipe."""
    lines: list[str] = []
    before: dict[str, Any] = {name: {} for name in _IN_PARTS}
    for piece in pieces:
        now = piece.model_dump(mode="json")
        changed = _differences(before, now)
        for part in _IN_PARTS & changed.keys():
            changed[part] = _differences(before[part], now[part])
        left_out = sorted(name for part in _IN_PARTS for name in before[part].keys() - now[part].keys())
        lines.append(
            json.dumps({**changed, **({_LEFT_OUT: left_out} if left_out else {})}, separators=(",", ":")) + "\n"
        )
        before = now
    write_text(path, "".join(lines))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in now.items() if name not in before or before[name] != value}


def _with_sweep(piece: PieceResult, sweeps: Iterable[TunedArm]) -> PieceResult:
    sweep = next((each for each in sweeps if (each.cell, each.arm) == (piece.cell.recipe, piece.arm)), None)
    if sweep is None or not sweep.applies_to(piece.recipe):
        return piece
    return piece.model_copy(update={"tuned": sweep.settings if sweep.chose(piece.recipe) else None})


def _merged(before: Iterable[Result], measured: Iterable[Result]) -> Mapping[str, Result]:
    # By arm first: pieces of one arm share most of their recipe, which is then written once.
    found = {f"{each.arm} {each.cell} {each.seed}": each for each in itertools.chain(before, measured)}
    return {key: found[key] for key in sorted(found)}
