"""Ratios against joint training on the high-memory pool, per cell and arm, over the seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moedisco_ray.compare.arms import REFERENCE

FIGURES = ("ppl_equal_tokens", "loss_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio")
LOW = {REFERENCE: "joint-low", "disco": "disco-low"}
"""Arms that are priced on the low-memory pool too: the same training, its gang sharded over cheap cards."""


def summarise(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per cell and arm.

    Args:
        results: One per (cell, seed): `cell`, `seed`, the `rows` of a comparison, and `setting`, whose `low_over_high` is the
            price of a FLOP on the low-memory pool over that on the other.

    Returns:
        `corpus`, `family`, `start`, `arm`, `seeds`, the medians of `FIGURES` (None where the arm has none, or where a seed never
        came to joint training's loss) and their `spread`, {figure: {min, max}}. Perplexities and losses are ratios to joint
        training's of the same seed, dollars are planned. Dollars to joint training's loss are those of complete runs, whose
        learning rates came down, and between two of them a straight line over log dollars; where the cheapest is good enough, its
        own, which is an upper bound.
    """
    by_arm: dict[tuple[str, str], list[tuple[int, dict[str, float | None]]]] = {}
    for result in results:
        for arm, figures in _figures(result["rows"], result["setting"]["low_over_high"]).items():
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


def _figures(rows: Sequence[Mapping[str, Any]], low_over_high: float) -> dict[str, dict[str, float | None]]:
    joint = rows[0]
    if joint["arm"] != REFERENCE:
        raise ValueError(f"the first row is {joint['arm']}, not {REFERENCE}")
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows[1:]:
        by_arm.setdefault(row["arm"], []).append(row)
    figures = {arm: _ratios(mine, joint) for arm, mine in by_arm.items()}
    for arm, low in LOW.items():
        cheaper = [
            {**row, "dollars": _priced(row, low_over_high)} for row in rows if row["arm"] == arm]
        if cheaper:
            found = _ratios([*cheaper, *by_arm.get(low, [])], joint)
            equal = [row for row in by_arm.get(low, []) if row["budget"] == "dollars"]
            figures[low] = {**found, "ppl_equal_dollars": _ratios(equal, joint)["ppl_equal_dollars"]}
    return figures


def _ratios(rows: Sequence[Mapping[str, Any]], joint: Mapping[str, Any]) -> dict[str, float | None]:
    perplexity = {row["budget"]: row["perplexity"] / joint["perplexity"] for row in rows}
    loss = {row["budget"]: math.log(row["perplexity"]) / math.log(joint["perplexity"]) for row in rows}
    dollars = dollars_to(joint["perplexity"], [(row["dollars"], row["perplexity"]) for row in rows])
    return {
        "ppl_equal_tokens": perplexity.get("tokens"), "loss_equal_tokens": loss.get("tokens"),
        "ppl_equal_dollars": perplexity.get("dollars"),
        "dollars_to_joint_loss_ratio": None if dollars is None else dollars / joint["dollars"]}


def dollars_to(perplexity: float, runs: Iterable[tuple[float, float]]) -> float | None:
    """What it costs to come to a perplexity, from complete runs.

    Args:
        perplexity: To come to.
        runs: Dollars and perplexity of each.

    Returns:
        None where none of them did.
    """
    ordered = sorted(runs)
    if ordered and ordered[0][1] <= perplexity:
        return ordered[0][0]
    for (less, worse), (more, better) in itertools.pairwise(ordered):
        if better <= perplexity:
            part = math.log(worse / perplexity) / math.log(worse / better)
            return less * (more / less) ** part
    return None


def _priced(row: Mapping[str, Any], low_over_high: float) -> float:
    return sum(phase["dollars"] * (low_over_high if phase["pool"] == "high_memory" else 1.0) for phase in row["phases"])
