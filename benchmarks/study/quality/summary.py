"""Summarises results as ratios to joint training on the high-memory pool, per cell and arm, over the seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.compare.arms import REFERENCE

FIGURES = ("ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio")
"""Figures in summary.json."""
MORE = (
    "loss_equal_tokens", "dollars_equal_tokens", "unseen_equal_tokens", "ppl_equal_hours", "hours_equal_tokens",
    "hours_equal_dollars", "metered_to_joint_loss")
"""Further figures that can be computed from the result files."""
LOW = {REFERENCE: "joint-low", "disco": "disco-low"}
"""Arms that are also priced on the low-memory pool: the same training, with its gang sharded over cheap cards."""
_AS_DEAR = 1.001
"""Maximum ratio of the dollars of two runs planned to cost the same; they differ because tokens and windows are whole numbers."""


def summarise(
    results: Iterable[Mapping[str, Any]], names: Sequence[str] = FIGURES, low_over_high: float | None = None,
) -> list[dict[str, Any]]:
    """One entry per cell and arm.

    Args:
        results: Result of each (cell, seed): `cell`, `seed`, the `rows` of a comparison, and `setting`, whose `low_over_high` is
            the price of a FLOP on the low-memory pool relative to the high-memory pool.
        names: Figures to compute, from `FIGURES` and `MORE`.
        low_over_high: Price ratio to assume instead of each result's own; metered dollars do not change.

    Returns:
        `corpus`, `family`, `start`, `arm`, `seeds`, the medians of the figures (None if the arm lacks the figure, or if a seed
        never reached joint training's loss) and their `spread`, {figure: {min, max}}. All figures are ratios to joint training at
        the same seed. Dollars and hours are planned and include everything in the account (`compare.accounting`); a row whose
        account has only training has none. Figures at joint training's dollars are interpolated between the arm's two complete
        runs, linearly in log perplexity (or log hours) over log dollars. Dollars to joint training's loss are also interpolated
        over log dollars between complete runs, whose learning rates have decayed; if even the cheapest run reaches the loss, its
        dollars are used, an upper bound. Metered dollars are relative to joint training in the same comparison, which is
        `joint_metered_dollars` if the row has it.
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
        # Hours and metered dollars on that pool depend on its number of workers, unlike the planned price.
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
    """A figure of an arm at a budget of dollars or hours, by log-log interpolation between two of its runs.

    Args:
        budget: Dollars or hours to spend.
        runs: Cost and figure of each run.

    Returns:
        The figure; that of a single run if it costs the same. None if all runs cost less, or all cost more.
    """
    ordered = sorted(runs)
    for (less, before), (more, after) in itertools.pairwise(ordered):
        if less <= budget <= more and more / less > 1:
            return before * (after / before) ** (math.log(budget / less) / math.log(more / less))
    nearest = min(ordered, key=lambda run: abs(math.log(run[0] / budget)), default=None)
    return nearest[1] if nearest is not None and 1 / _AS_DEAR <= nearest[0] / budget <= _AS_DEAR else None


def dollars_to(perplexity: float, runs: Iterable[tuple[float, float]]) -> float | None:
    """Dollars to reach a perplexity, from complete runs.

    Args:
        perplexity: Perplexity to reach.
        runs: Dollars and perplexity of each run.

    Returns:
        Dollars; None if no run reached the perplexity.
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
    """Whether the row's account includes more than training."""
    return any(phase["stage"] == "evaluate" for phase in row["phases"])


def _priced(row: Mapping[str, Any], **factors: float) -> dict[str, Any]:
    """The row, with the planned dollars of each pool multiplied by its factor."""
    phases = [{**phase, "dollars": phase["dollars"] * factors.get(phase["pool"], 1.0)} for phase in row["phases"]]
    return {**row, "phases": phases, "dollars": sum(phase["dollars"] for phase in phases)}
