"""The grid's section of RESULTS.md, from results/summary.json and results/pieces.jsonl."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid.files import PIECES, PUBLISHED, SUMMARY, read_lines
from benchmarks.study.grid.pieces import OURS
from benchmarks.study.grid.prices import books
from benchmarks.study.grid.records import Dollars, Entry, PieceResult
from benchmarks.study.grid.summary import JOINT_LOW

ROWS: Mapping[str, str] = {
    OURS: "ours", "parallel-seed": "ours, seed on all cards", "expert-upcycling": "Expert Upcycling", "upcycle": "sparse upcycling",
    JOINT_LOW: "joint on the cheap pool"}
"""Rows of a table, by arm; arms without a result have none."""
_MARKETS = tuple(books())
HEAD = [
    "arm", "gap, nats", "its slope", *(f"dollars, {name}" for name in _MARKETS), *(f"equal tokens, {name}" for name in _MARKETS),
    "hours"]
_UNKNOWN = "-"


def entries() -> tuple[Entry, ...]:
    """The published summary; empty if nothing is published."""
    path = PUBLISHED / SUMMARY
    if not path.exists():
        return ()
    return tuple(Entry.model_validate(each) for each in json.loads(path.read_text(encoding="utf-8")))


def tables(found: Iterable[Entry]) -> dict[str, list[list[str]]]:
    """The rows of each cell's table at its largest budget, by the table's title."""
    by_cell: dict[tuple[str, str, str, int, int], list[Entry]] = {}
    for entry in found:
        by_cell.setdefault((entry.corpus, entry.family, entry.start, entry.experts, entry.top_k), []).append(entry)
    result = {}
    for (corpus, family, start, experts, top_k), cell in by_cell.items():
        largest = max(entry.budget_tokens for entry in cell if entry.arm == OURS or not any(each.arm == OURS for each in cell))
        rows = [
            _row(entry, [each for each in cell if each.arm == arm])
            for arm in ROWS for entry in cell if (entry.arm, entry.budget_tokens) == (arm, largest)]
        joint = next(entry for entry in cell if (entry.arm, entry.budget_tokens) == (REFERENCE, largest))
        how = "tuned" if all(entry.tuned for entry in cell) else "at the starting values, not tuned"
        seeds = ", ".join(map(str, sorted({seed for entry in cell for seed in entry.seeds})))
        result[
            f"{corpus}, {family}, start {start}, {experts} experts, top-{top_k} ({entry_share(joint)} active), "
            f"{largest:,} tokens, seeds {seeds}, {how}; joint training's loss {joint.loss:.3f}"] = rows
    return result


def entry_share(entry: Entry) -> str:
    """The active share of an entry, as a percentage."""
    return f"{100 * entry.active_share:.3g} %"


def prices() -> str:
    """The cards and prices of the price books, in words."""
    return "; ".join(
        f"{book.name}: {book.cheap.gpu} for ${book.cheap.price_per_hour:g} per hour at speed {book.cheap.speed:.2g}, "
        f"{book.large.gpu} for ${book.large.price_per_hour:g} at {book.large.speed:.2g}" for book in books().values())


def made_with() -> str:
    """Software and machines with which the pieces were measured, each once."""
    made = [piece.made for piece in read_lines(PUBLISHED / PIECES, PieceResult)]
    parts = {
        "": [f"`{each.command}`" for each in made], "commit": [each.commit for each in made],
        "on": [f"{each.date}, {each.processor}, {each.cores} cores" for each in made],
        "with": [", ".join(f"{name} {version}" for name, version in each.versions.items()) for each in made]}
    return "; ".join(f"{name} {', '.join(dict.fromkeys(values))}".strip() for name, values in parts.items())


def _row(entry: Entry, budgets: Iterable[Entry]) -> list[str]:
    spread = entry.loss_gap_spread
    several = f" ({spread.min:+.3f} to {spread.max:+.3f})" if len(entry.seeds) > 1 else ""
    return [
        ROWS[entry.arm], f"{entry.loss_gap:+.3f}{several}", _slope(budgets), *_figures(entry.dollars_to_joint_loss),
        *_figures(entry.dollars_equal_tokens), f"{entry.hours_ratio:.2f}"]


def _slope(budgets: Iterable[Entry]) -> str:
    """Change of the gap from the smallest to the largest budget, for four times the tokens."""
    ordered = sorted(budgets, key=lambda entry: entry.budget_tokens)
    first, last = ordered[0], ordered[-1]
    if first.budget_tokens == last.budget_tokens:
        return _UNKNOWN
    return f"{(last.loss_gap - first.loss_gap) / math.log(last.budget_tokens / first.budget_tokens, 4):+.3f}"


def _figures(dollars: Dollars) -> list[str]:
    return [_UNKNOWN if value is None else f"{value:.2f}" for value in map(functools.partial(getattr, dollars), _MARKETS)]
