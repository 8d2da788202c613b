"""Ratios against joint training on the high-memory pool, per cell and arm, over the seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.compare.arms import REFERENCE

FIGURES = ("ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio")
"""What summary.json holds of each."""
MORE = (
    "loss_equal_tokens", "dollars_equal_tokens", "unseen_equal_tokens", "ppl_equal_hours", "hours_equal_tokens",
    "hours_equal_dollars", "metered_to_joint_loss")
"""Further figures of the result files."""
LOW = {REFERENCE: "joint-low", "disco": "disco-low"}
"""Arms that are priced on the low-memory pool too: the same training, its gang sharded over cheap cards."""
_AS_DEAR = 1.001
"""Dollars of two runs that were to cost the same differ by less: tokens are whole, and so are windows of calibration."""


def summarise(
    results: Iterable[Mapping[str, Any]], names: Sequence[str] = FIGURES, low_over_high: float | None = None,
) -> list[dict[str, Any]]:
    """One entry per cell and arm.

    Args:
        results: One per (cell, seed): `cell`, `seed`, the `rows` of a comparison, and `setting`, whose `low_over_high` is the
            price of a FLOP on the low-memory pool over that on the other.
        names: Which figures, of `FIGURES` and `MORE`.
        low_over_high: As if the low-memory pool had this price; the metered dollars stay what they were.

    Returns:
        `corpus`, `family`, `start`, `arm`, `seeds`, the medians of the figures (None where the arm has none, or where a seed never
        came to joint training's loss) and their `spread`, {figure: {min, max}}. All are ratios to joint training's of the same
        seed; dollars and hours are planned, of everything that the arm pays for (`compare.accounting`), and a row that was
        accounted for training alone has none. What an arm reaches at joint training's dollars is between its two
        complete runs, on a straight line of log perplexity (or hours) over log dollars at joint training's dollars exactly, which
        the longer of them need not cost to the last one. Dollars to joint training's loss are those of complete runs, whose
        learning rates came down, and between two of them a straight line over log dollars; where the cheapest is good enough, its
        own, which is an upper bound. Metered dollars are over those of joint training in the same comparison, where a row has
        them as its `joint_metered_dollars`.
    """
    by_arm: dict[tuple[str, str], list[tuple[int, dict[str, float | None]]]] = {}
    for result in results:
        own = result["setting"]["low_over_high"]
        price = own if low_over_high is None else low_over_high
        for arm, figures in _figures([_priced(row, low_memory=price / own) for row in result["rows"]], price).items():
            by_arm.setdefault((result["cell"], arm), []).append((result["seed"], figures))
    entries = []
    for (cell, arm), found in by_arm.items():
        corpus, family, start = cell.split("/")
        values = {name: [figures[name] for _, figures in found] for name in names}
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
        # How long it takes there depends on how many workers share it, which its price does not.
        unknown = {"hours": None, "metered_dollars": None}
        cheaper = [{**_priced(row, high_memory=low_over_high), **unknown} for row in rows if row["arm"] == arm]
        if cheaper:
            figures[low] = _ratios([*cheaper, *by_arm.get(low, [])], joint)
    return figures


def _ratios(rows: Sequence[Mapping[str, Any]], joint: Mapping[str, Any]) -> dict[str, float | None]:
    told = rows if all(_is_whole(row) for row in (joint, *rows)) else []
    timed = [row for row in told if row["hours"] is not None]
    perplexities = [(row["dollars"], row["perplexity"]) for row in told]
    metered = [
        (row["metered_dollars"] / row.get("joint_metered_dollars", joint["metered_dollars"]), row["perplexity"])
        for row in rows if row.get("metered_dollars") is not None]
    perplexity = _at_tokens(rows, "perplexity")
    return {
        "ppl_equal_tokens": _over(perplexity, joint["perplexity"]),
        "loss_equal_tokens": None if perplexity is None else math.log(perplexity) / math.log(joint["perplexity"]),
        "metered_to_joint_loss": dollars_to(joint["perplexity"], metered) if len(metered) == len(rows) else None,
        "dollars_equal_tokens": _over(_at_tokens(told, "dollars"), joint["dollars"]),
        "unseen_equal_tokens": _over(_at_tokens(rows, "unseen"), joint.get("unseen")),
        "ppl_equal_hours": _over(
            at_budget(joint["hours"], [(row["hours"], row["perplexity"]) for row in timed]), joint["perplexity"]),
        "hours_equal_tokens": _over(_at_tokens(timed, "hours"), joint["hours"]),
        "ppl_equal_dollars": _over(at_budget(joint["dollars"], perplexities), joint["perplexity"]),
        "hours_equal_dollars": _over(
            at_budget(joint["dollars"], [(row["dollars"], row["hours"]) for row in timed]), joint["hours"]),
        "dollars_to_joint_loss_ratio": _over(dollars_to(joint["perplexity"], perplexities), joint["dollars"])}


def at_budget(budget: float, runs: Iterable[tuple[float, float]]) -> float | None:
    """What an arm reaches at a budget of dollars or hours: a straight line, log over log, between two of its runs.

    Args:
        budget: To spend.
        runs: What each cost, and what it has.

    Returns:
        None where all of them cost less, or all more; a run's own where it costs as much.
    """
    ordered = sorted(runs)
    for (less, before), (more, after) in itertools.pairwise(ordered):
        if less <= budget <= more and more / less > 1:
            return before * (after / before) ** (math.log(budget / less) / math.log(more / less))
    nearest = min(ordered, key=lambda run: abs(math.log(run[0] / budget)), default=None)
    return nearest[1] if nearest is not None and 1 / _AS_DEAR <= nearest[0] / budget <= _AS_DEAR else None


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


def _at_tokens(rows: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return next((row.get(name) for row in rows if row["budget"] == "tokens"), None)


def _over(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether more than its training was accounted for."""
    return any(phase["stage"] == "evaluate" for phase in row["phases"])


def _priced(row: Mapping[str, Any], **factors: float) -> dict[str, Any]:
    """The row, with the planned dollars of each pool multiplied by its factor."""
    phases = [{**phase, "dollars": phase["dollars"] * factors.get(phase["pool"], 1.0)} for phase in row["phases"]]
    return {**row, "phases": phases, "dollars": sum(phase["dollars"] for phase in phases)}
