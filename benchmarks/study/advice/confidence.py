"""Rates how certain an advice is: each ground by fixed thresholds, and the whole advice by its weakest ground."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from benchmarks.study.advice.fitting import DRAWS, Noise

Level = Literal["high", "medium", "low"]
_LEVELS: tuple[Level, ...] = ("low", "medium", "high")
_INSIDE = 1.05
"""Factor beyond the measured sizes up to which a run does not count as an extrapolation."""
_NEAR = 4.0


class Ground(NamedTuple):
    """One ground of an advice, and its rating."""

    level: Level
    words: str


class Confidence(BaseModel):
    """The rating of an advice, with its grounds."""

    model_config = ConfigDict(frozen=True)

    level: Level
    grounds: tuple[Ground, ...]
    """All grounds, the weakest first."""


def weigh(grounds: Iterable[Ground]) -> Confidence:
    """The confidence of an advice: that of its weakest ground.

    Args:
        grounds: Grounds of the advice, at least one.
    """
    ordered = sorted(grounds, key=lambda ground: _LEVELS.index(ground.level))
    return Confidence(level=ordered[0].level, grounds=tuple(ordered))


def reach(extrapolation: float, runs: int) -> Ground:
    """Rate the extrapolation from the measured runs.

    Args:
        extrapolation: Factor in tokens to the nearest run of the recipe; 1 within the measured range.
        runs: Number of runs of the recipe.
    """
    if extrapolation <= _INSIDE:
        return Ground("high", f"interpolates between {runs} runs of this recipe")
    level: Level = "medium" if extrapolation <= _NEAR else "low"
    return Ground(level, f"extrapolates {extrapolation:.1f}x beyond the measured runs of this recipe")


def shape(sizes: int, extrapolation: float) -> Ground:
    """Rate how well the shape of the curve is known.

    Args:
        sizes: Number of token counts at which the recipe was measured.
        extrapolation: Factor in tokens to the nearest run of the recipe; 1 within the measured range.
    """
    if sizes == 1:
        return Ground("low", "measured at one size: its curve is as steep as the other recipes'")
    if sizes > 2:
        return Ground("high", f"its curve is a power law through {sizes} sizes")
    if extrapolation <= _INSIDE:
        return Ground("high", "its curve is a straight line between two sizes")
    return Ground("medium", "its curve is a straight line through two sizes, which promises too much beyond them")


def scatter(noise: Noise | None) -> Ground:
    """Rate how well the scatter between runs is known."""
    if noise is None:
        return Ground("low", "one run of each: what chance does is not known")
    if noise.seeds == 1:
        return Ground("low", "one seed: how much seeds differ is not known")
    return Ground("high" if noise.seeds > 2 else "medium", f"{noise.seeds} seeds")


def lead(best_in: float | None, recipes: int) -> Ground:
    """Rate the lead of the advised recipe over the others.

    Args:
        best_in: Share of the draws in which the advised recipe is the best; None without draws.
        recipes: Number of recipes considered.
    """
    if recipes == 1:
        return Ground("medium", "no other recipe can be weighed against it")
    if best_in is None:
        return Ground("medium", f"the best of {recipes} recipes; whether by more than chance is not known")
    level: Level = "high" if best_in >= 0.9 else "medium" if best_in >= 0.6 else "low"
    return Ground(level, f"the best of {recipes} recipes in {best_in:.0%} of {DRAWS} resamplings")


def pairing(common: Mapping[str, int], subjects: int) -> Ground:
    """Rate whether the advised recipe was measured on the same subjects as the others; used if other models were measured.

    Args:
        common: Number of subjects shared with each other recipe, by its title.
        subjects: Number of measured subjects.
    """
    if all(each == subjects for each in common.values()):
        return Ground("high", "measured wherever the other recipes were")
    rival, fewest = min(common.items(), key=lambda pair: pair[1])
    if not fewest:
        return Ground("low", f"never measured with {rival}: compared through other recipes, or through joint training alone")
    return Ground("medium" if fewest > 1 else "low", f"measured with {rival} in {fewest} of {subjects} other models or texts")


def likeness(factor: float, subjects: int) -> Ground:
    """Rate how similar in size the measured models are to the configuration's; used if other models were measured.

    Args:
        factor: Ratio of the larger to the smaller parameter count.
        subjects: Number of measured subjects.
    """
    of = "another model or text" if subjects == 1 else f"{subjects} other models or texts"
    size = "as large" if factor <= _INSIDE else f"{factor:.1f}x apart in size"
    return Ground("medium" if factor <= _NEAR and subjects > 1 else "low", f"measured on {of}, {size}")


def duration(factor: float) -> Ground:
    """Rate how similar in length the measured trainings are to the advised one.

    Args:
        factor: Ratio of tokens per parameter to the nearest measured value, inverted if below 1.
    """
    if factor <= _INSIDE:
        return Ground("high", "as many tokens per parameter as were measured")
    level: Level = "medium" if factor <= _NEAR else "low"
    return Ground(level, f"tokens per parameter are {factor:.1f}x away from what was measured")
