"""How sure an advice is, in words that follow from numbers: each ground by itself, and the weakest of them for the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from benchmarks.study.advice.study import DRAWS, Noise

Level = Literal["high", "medium", "low"]
_LEVELS: tuple[Level, ...] = ("low", "medium", "high")
_INSIDE = 1.05
"""A run that is larger than the largest measured one by less is not an extrapolation."""
_NEAR = 4.0


class Ground(NamedTuple):
    """One thing that an advice rests on, and how well."""

    level: Level
    words: str


class Confidence(BaseModel):
    """How sure, and why."""

    model_config = ConfigDict(frozen=True)

    level: Level
    grounds: tuple[Ground, ...]
    """The weakest first."""


def weigh(grounds: Iterable[Ground]) -> Confidence:
    """As sure as the weakest of the grounds.

    Args:
        grounds: At least one.
    """
    ordered = sorted(grounds, key=lambda ground: _LEVELS.index(ground.level))
    return Confidence(level=ordered[0].level, grounds=tuple(ordered))


def reach(extrapolation: float, runs: int) -> Ground:
    """How far from what was measured.

    Args:
        extrapolation: Factor in tokens to the nearest run of the recipe; 1 between them.
        runs: Of the recipe.
    """
    if extrapolation <= _INSIDE:
        return Ground("high", f"interpolates between {runs} runs of this recipe")
    level: Level = "medium" if extrapolation <= _NEAR else "low"
    return Ground(level, f"extrapolates {extrapolation:.1f}x beyond the measured runs of this recipe")


def shape(sizes: int, extrapolation: float) -> Ground:
    """What the curve rests on.

    Args:
        sizes: Numbers of tokens that the recipe was measured with.
        extrapolation: As in `reach`.
    """
    if sizes == 1:
        return Ground("low", "measured at one size: its curve is as steep as the other recipes'")
    if sizes > 2:
        return Ground("high", f"its curve is a power law through {sizes} sizes")
    if extrapolation <= _INSIDE:
        return Ground("high", "its curve is a straight line between two sizes")
    return Ground("medium", "its curve is a straight line through two sizes, which promises too much beyond them")


def scatter(noise: Noise | None) -> Ground:
    """What is known of chance."""
    if noise is None:
        return Ground("low", "one run of each: what chance does is not known")
    if noise.seeds == 1:
        return Ground("low", "one seed: how much seeds differ is not known")
    return Ground("high" if noise.seeds > 2 else "medium", f"{noise.seeds} seeds")


def lead(best_in: float | None, recipes: int) -> Ground:
    """Whether another recipe could be the best as well.

    Args:
        best_in: Share of the draws in which this one is; None where there are none.
        recipes: That were weighed.
    """
    if recipes == 1:
        return Ground("medium", "no other recipe can be weighed against it")
    if best_in is None:
        return Ground("medium", f"the best of {recipes} recipes; whether by more than chance is not known")
    level: Level = "high" if best_in >= 0.9 else "medium" if best_in >= 0.6 else "low"
    return Ground(level, f"the best of {recipes} recipes in {best_in:.0%} of {DRAWS} resamplings")


def pairing(common: Mapping[str, int], subjects: int) -> Ground:
    """Whether the advised recipe was measured together with the others, where that was in other models.

    Args:
        common: How many subjects have it and each of the others, by the other's title.
        subjects: That were measured.
    """
    if all(each == subjects for each in common.values()):
        return Ground("high", "measured wherever the other recipes were")
    rival, fewest = min(common.items(), key=lambda pair: pair[1])
    if not fewest:
        return Ground("low", f"never measured beside {rival}: compared by way of others, or else of joint training alone")
    return Ground("medium" if fewest > 1 else "low", f"measured beside {rival} in {fewest} of {subjects} other models or texts")


def likeness(factor: float, subjects: int) -> Ground:
    """How like the measured model the configuration's is, where it is another one.

    Args:
        factor: Parameters of the larger one over the smaller one's.
        subjects: That were measured.
    """
    of = "another model or text" if subjects == 1 else f"{subjects} other models or texts"
    size = "as large" if factor <= _INSIDE else f"{factor:.1f}x apart in size"
    return Ground("medium" if factor <= _NEAR and subjects > 1 else "low", f"measured on {of}, {size}")


def duration(factor: float) -> Ground:
    """How like the measured trainings' length this one's is.

    Args:
        factor: Tokens per parameter over the most that were measured, or the least that were measured over them; at least 1.
    """
    if factor <= _INSIDE:
        return Ground("high", "as many tokens per parameter as were measured")
    level: Level = "medium" if factor <= _NEAR else "low"
    return Ground(level, f"tokens per parameter are {factor:.1f}x away from what was measured")
