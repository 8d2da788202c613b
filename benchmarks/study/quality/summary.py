"""Summarises results as ratios to joint training on the high-memory pool, per cell and arm, over the seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness import shortened
from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.quality.records import CellFigures, RunFigures
from moedisco_ray.core.records import Record

FIGURES = ("ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio")
"""Figures in summary.json."""
MORE = (
    "loss_equal_tokens", "dollars_equal_tokens", "unseen_equal_tokens", "ppl_equal_hours", "hours_equal_tokens",
    "hours_equal_dollars", "metered_to_joint_loss")
"""Further figures that can be computed from the published figures."""
LOW = {REFERENCE: "joint-low", "disco": "disco-low"}
"""Arms that are also priced on the low-memory pool: the same training, with its gang sharded over cheap cards."""
_EQUAL_DOLLARS = 1.001
"""Maximum ratio of the dollars of two runs planned to cost the same; they differ because tokens and windows are whole numbers."""


class Spread(Record):
    """Smallest and largest value over the seeds."""

    min: float
    max: float


class Entry(Record):
    """Figures of an arm in a cell, over the seeds."""

    corpus: str
    family: str
    start: str
    arm: str
    seeds: tuple[int, ...]
    medians: dict[str, float | None]
    """Medians of the figures; null if the arm lacks the figure, or if a seed never reached joint training's loss."""
    spread: dict[str, Spread]
    """Smallest and largest value of each figure that is not null."""

    def to_json(self) -> dict[str, Any]:
        """The entry in `summary.json`, where figures have seven digits and stand next to the arm's name."""
        flat: dict[str, Any] = shortened(self.model_dump(mode="json"))
        medians, spread = flat.pop("medians"), flat.pop("spread")
        return {**flat, **medians, "spread": spread}


def summarise(
    results: Iterable[CellFigures], names: Sequence[str] = FIGURES, low_over_high: float | None = None,
) -> list[Entry]:
    """One entry per cell and arm; all figures are ratios to joint training at the same seed.

    Dollars and hours are planned and include everything in the account (`compare.accounting`). Figures at joint training's dollars
    are interpolated between the arm's two complete runs, linearly in log perplexity (or log hours) over log dollars. Dollars to
    joint training's loss are also interpolated over log dollars between complete runs, whose learning rates have decayed; if even
    the cheapest run reaches the loss, its dollars are used, an upper bound.

    Args:
        results: Figures of each (cell, seed).
        names: Figures to compute, from `FIGURES` and `MORE`.
        low_over_high: Price of a FLOP on the low-memory pool relative to the high-memory pool, in place of each result's own;
            metered dollars do not change.
    """
    by_arm: dict[tuple[str, str], list[tuple[int, dict[str, float | None]]]] = {}
    for result in results:
        own = result.setting.low_over_high
        price = own if low_over_high is None else low_over_high
        runs = [_priced(run, low_memory=price / own) for run in result.runs]
        for arm, figures in _figures(runs, price).items():
            by_arm.setdefault((result.cell, arm), []).append((result.seed, figures))
    entries = []
    for (cell, arm), found in by_arm.items():
        corpus, family, start = cell.split("/")
        values = {name: [figures[name] for _, figures in found] for name in names}
        known = {name: [value for value in each if value is not None] for name, each in values.items() if None not in each}
        entries.append(Entry(
            corpus=corpus, family=family, start=start, arm=arm, seeds=tuple(sorted(seed for seed, _ in found)),
            medians={name: statistics.median(known[name]) if name in known else None for name in names},
            spread={name: Spread(min=min(each), max=max(each)) for name, each in known.items()}))
    return entries


def _figures(runs: Sequence[RunFigures], low_over_high: float) -> dict[str, dict[str, float | None]]:
    joint = runs[0]
    if joint.arm != REFERENCE:
        raise ValueError(f"the first run is {joint.arm}, not {REFERENCE}")
    by_arm: dict[str, list[RunFigures]] = {}
    for run in runs[1:]:
        by_arm.setdefault(run.arm, []).append(run)
    figures = {arm: _ratios(own, joint) for arm, own in by_arm.items()}
    for arm, low in LOW.items():
        # Hours and metered dollars on that pool depend on its number of workers, unlike the planned price.
        unknown = {"hours": None, "metered": None}
        cheaper = [_priced(run, high_memory=low_over_high).model_copy(update=unknown) for run in runs if run.arm == arm]
        if cheaper:
            figures[low] = _ratios([*cheaper, *by_arm.get(low, [])], joint)
    return figures


def _ratios(runs: Sequence[RunFigures], joint: RunFigures) -> dict[str, float | None]:
    at_tokens = next((run for run in runs if run.budget == "tokens"), None)
    hours = [(run, run.hours) for run in runs if run.hours is not None]
    perplexities = [(run.total_dollars, run.perplexity) for run in runs]
    metered = [(run.metered, run.perplexity) for run in runs if run.metered is not None]
    return {
        "ppl_equal_tokens": _over(at_tokens.perplexity if at_tokens else None, joint.perplexity),
        "loss_equal_tokens": math.log(at_tokens.perplexity) / math.log(joint.perplexity) if at_tokens else None,
        "metered_to_joint_loss": dollars_to(joint.perplexity, metered) if len(metered) == len(runs) else None,
        "dollars_equal_tokens": _over(at_tokens.total_dollars if at_tokens else None, joint.total_dollars),
        "unseen_equal_tokens": _over(at_tokens.unseen if at_tokens else None, joint.unseen),
        "ppl_equal_hours": joint.hours and _over(
            at_budget(joint.hours, [(time, run.perplexity) for run, time in hours]), joint.perplexity),
        "hours_equal_tokens": _over(at_tokens.hours if at_tokens else None, joint.hours),
        "ppl_equal_dollars": _over(at_budget(joint.total_dollars, perplexities), joint.perplexity),
        "hours_equal_dollars": _over(
            at_budget(joint.total_dollars, [(run.total_dollars, time) for run, time in hours]), joint.hours),
        "dollars_to_joint_loss_ratio": _over(dollars_to(joint.perplexity, perplexities), joint.total_dollars)}


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
    return nearest[1] if nearest is not None and 1 / _EQUAL_DOLLARS <= nearest[0] / budget <= _EQUAL_DOLLARS else None


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


def _over(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference


def _priced(run: RunFigures, **factors: float) -> RunFigures:
    """The run, with the planned dollars of each pool multiplied by its factor."""
    dollars = {pool: tuple(each * factors.get(pool, 1.0) for each in phases) for pool, phases in run.dollars.items()}
    return run.model_copy(update={"dollars": dollars})
