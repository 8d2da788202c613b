"""Ratios against joint training, per cell and arm, over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moedisco_ray.compare.arms import REFERENCE

FIGURES = ("ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio")


def summarise(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per cell and arm.

    Args:
        results: One per (cell, seed): `cell`, `seed` and the `rows` of a comparison.

    Returns:
        `corpus`, `family`, `start`, `arm`, `seeds`, the medians of `FIGURES` (None where the arm has none, or where a seed never
        came to joint training's loss) and their `spread`, {figure: {min, max}}. Perplexities are ratios to joint training's of the
        same seed, dollars are planned.
    """
    by_arm: dict[tuple[str, str], list[tuple[int, dict[str, float | None]]]] = {}
    for result in results:
        for arm, figures in _figures(result["rows"]).items():
            by_arm.setdefault((result["cell"], arm), []).append((result["seed"], figures))
    entries = []
    for (cell, arm), found in by_arm.items():
        corpus, family, start = cell.split("/")
        values = {name: [figures[name] for _, figures in found] for name in FIGURES}
        entries.append({
            "corpus": corpus, "family": family, "start": start, "arm": arm, "seeds": sorted(seed for seed, _ in found),
            **{name: None if None in each else statistics.median(each) for name, each in values.items()},
            "spread": {name: {"min": min(each), "max": max(each)} for name, each in values.items() if None not in each}})
    return entries


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    joint = rows[0]
    if joint["arm"] != REFERENCE:
        raise ValueError(f"the first row is {joint['arm']}, not {REFERENCE}")
    runs = {(row["arm"], row["budget"]): row for row in rows}
    figures: dict[str, dict[str, float | None]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows[1:]):
        tokens, dollars = runs.get((arm, "tokens")), runs.get((arm, "dollars"))
        reached = [
            row["dollars_to_target"] for row in (tokens, dollars) if row is not None and row["dollars_to_target"] is not None]
        figures[arm] = {
            "ppl_equal_tokens": tokens["perplexity"] / joint["perplexity"] if tokens else None,
            "ppl_equal_dollars": dollars["perplexity"] / joint["perplexity"] if dollars else None,
            "dollars_to_joint_loss_ratio": min(reached) / joint["dollars_to_target"] if reached else None}
    return figures
