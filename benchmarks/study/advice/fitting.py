"""Fits a loss curve to each recipe that was measured on one subject, and estimates the effect of chance on the curves."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.advice.loss_curve import Curve, Size, fit_curve, through_one
from benchmarks.study.advice.measured import MeasuredRun
from benchmarks.study.recipe import Subject
from moedisco_ray.core.errors import RunDirError

POOL = "finetune.pool"
"""Setting that is not part of a recipe: the gang's pool changes the cost of tokens, not the result."""
_SYNC_EVERY = "submodels.sync_every"
DRAWS = 400
_SEED = 20_260_101


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with its measured runs.

    Attributes:
        titles: Title by pool on which the gang was measured; key None for a recipe without a gang.
        settings: Values by dotted path, except the gang's pool and `sync_every`.
        sync_every: Steps between two sync rounds if they are the same at all sizes, otherwise None.
        rounds: Number of sync rounds of a sub-model in the largest run; None without rounds.
        reference: Whether this recipe is the reference.
        runs: Runs of all sizes.
    """

    titles: Mapping[str | None, str]
    settings: Mapping[str, Any]
    sync_every: int | None
    rounds: int | None
    reference: bool
    runs: tuple[MeasuredRun, ...]

    @property
    def key(self) -> str:
        """Key that is equal only for equal recipes."""
        return json.dumps([self.settings, self.sync_every, self.rounds], sort_keys=True)

    @property
    def title(self) -> str:
        """One title for all pools."""
        return min(self.titles.values())

    @property
    def smallest(self) -> int:
        """Tokens of the smallest run."""
        return min(run.tokens for run in self.runs)

    @property
    def largest(self) -> int:
        """Tokens of the largest run."""
        return max(run.tokens for run in self.runs)

    def sizes(self, loss: Callable[[MeasuredRun], float] = lambda run: run.loss) -> list[Size]:
        """Sizes of the recipe with their mean losses, the smallest first."""
        by_tokens: dict[int, list[float]] = defaultdict(list)
        for run in self.runs:
            by_tokens[run.tokens].append(loss(run))
        return [Size(tokens, statistics.fmean(losses), len(losses)) for tokens, losses in sorted(by_tokens.items())]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviations of runs from their recipe's curve (nats per token).

    Attributes:
        seed: Deviation that all runs of a seed share, because they are measured on the same documents.
        seeds: Number of seeds.
        run: Deviation of a single run, including the misfit of the curve.
        freedom: Degrees of freedom of `run`: the number of runs minus the number of fitted parameters.
    """

    seed: float
    seeds: int
    run: float
    freedom: int

    def draw(self, rng: random.Random) -> tuple[float, float]:
        """Draw both standard deviations, given that they were estimated from few runs."""
        return self.seed * _factor(rng, self.seeds - 1), self.run * _factor(rng, self.freedom)


@dataclasses.dataclass(frozen=True)
class Draw:
    """A bootstrap sample of the curves.

    Attributes:
        curves: Curves in the order of the recipes.
        miss: Deviation of one further run from its curve (nats per token).
    """

    curves: tuple[Curve, ...]
    miss: float


@dataclasses.dataclass(frozen=True)
class Fits:
    """The recipes that were measured on one subject, with their fitted curves.

    Attributes:
        subject: Subject of all runs.
        recipes: Recipes, in the order of their keys.
        curves: Curve of each recipe.
        noise: Scatter of the runs; None if each fitted parameter has only one run, so that it is unknown.
    """

    subject: Subject
    recipes: tuple[Recipe, ...]
    curves: tuple[Curve, ...]
    noise: Noise | None

    def draws(self) -> list[Draw]:
        """`DRAWS` samples of a parametric bootstrap, always the same; empty if the noise is unknown.

        In each sample every run gets a new loss (the curve's, plus a deviation of its seed and one of its own), and all curves are
        fitted again. The slope of a recipe with one size is that of another recipe, drawn anew for each sample.
        """
        if self.noise is None:
            return []
        rng = random.Random(_SEED)
        return [self._draw(self.noise, rng) for _ in range(DRAWS)]

    def _draw(self, noise: Noise, rng: random.Random) -> Draw:
        of_seed, of_run = noise.draw(rng)
        seeds: dict[int, float] = defaultdict(lambda: rng.gauss(0, of_seed))

        def again(curve: Curve) -> Callable[[MeasuredRun], float]:
            return lambda run: curve.loss(run.tokens) + seeds[run.seed] + rng.gauss(0, of_run)

        sizes = [recipe.sizes(again(curve)) for recipe, curve in zip(self.recipes, self.curves, strict=True)]
        curves = fit_all(sizes, lambda others: [rng.choice(others)])
        return Draw(tuple(curves), rng.gauss(0, math.hypot(of_seed, of_run)))


def fit_recipes(runs: Iterable[MeasuredRun]) -> Fits:
    """Fit every recipe of one subject.

    Args:
        runs: Measured runs of the subject, in any order.

    Raises:
        RunDirError: No recipe was measured at two sizes, so that the fall of the loss is unknown.
    """
    ordered = sorted(runs, key=lambda run: run.identity)
    recipes = tuple(sorted(_recipes(ordered), key=lambda recipe: recipe.key))
    sizes = [recipe.sizes() for recipe in recipes]
    if all(len(each) < 2 for each in sizes):
        raise RunDirError(
            "--from", None, "every recipe was measured at one number of tokens only, which does not show how its loss falls; "
            "add a run with more tokens")
    curves = fit_all(sizes, lambda others: others)
    return Fits(ordered[0].subject, recipes, tuple(curves), _noise(recipes, curves))


def fit_all(sizes: Sequence[Sequence[Size]], like: Callable[[list[Curve]], list[Curve]]) -> list[Curve]:
    """Fit a curve to each recipe; a recipe with one size takes its slope from other recipes.

    Args:
        sizes: Sizes of each recipe.
        like: Chooses, from the fitted curves, those that give the slope of a recipe with one size.
    """
    own = {i: fit_curve(each) for i, each in enumerate(sizes) if len(each) > 1}
    others = list(own.values())
    return [own[i] if i in own else through_one(each[0], like(others)) for i, each in enumerate(sizes)]


def _recipes(runs: Sequence[MeasuredRun]) -> list[Recipe]:
    groups: dict[str, list[MeasuredRun]] = defaultdict(list)
    for run in runs:
        groups[json.dumps(_settings(run), sort_keys=True)].append(run)
    return [recipe for group in groups.values() for recipe in _of_group(group)]


def _of_group(group: Sequence[MeasuredRun]) -> list[Recipe]:
    """Split runs that differ only in how often sub-models synchronise into recipes.

    A recipe keeps either its number of rounds or its steps between rounds at every size. The reading that gives fewer recipes, and
    so longer curves, is chosen; if both give the same number, rounds are kept.
    """
    by_rounds: dict[int | None, list[MeasuredRun]] = defaultdict(list)
    by_steps: dict[int | None, list[MeasuredRun]] = defaultdict(list)
    for run in group:
        by_rounds[run.rounds].append(run)
        by_steps[run.sync_every].append(run)
    parts = by_rounds if len(by_rounds) <= len(by_steps) else by_steps
    return [
        Recipe(
            titles=_titles(runs), settings=_settings(runs[0]),
            sync_every=sync_every if parts is by_steps else None, rounds=max(runs, key=lambda run: run.tokens).rounds,
            reference=any(run.reference for run in runs), runs=tuple(runs))
        for sync_every, runs in parts.items()]


def _titles(runs: Sequence[MeasuredRun]) -> dict[str | None, str]:
    pools = {run.recipe.get(POOL) for run in runs}
    return {pool: min(run.title for run in runs if run.recipe.get(POOL) == pool) for pool in pools}


def _settings(run: MeasuredRun) -> dict[str, Any]:
    return {path: value for path, value in run.recipe.items() if path not in (POOL, _SYNC_EVERY)}


def _noise(recipes: Sequence[Recipe], curves: Sequence[Curve]) -> Noise | None:
    missed = [
        (run.seed, run.loss - curve.loss(run.tokens)) for recipe, curve in zip(recipes, curves, strict=True) for run in recipe.runs]
    by_seed: dict[int, list[float]] = defaultdict(list)
    for seed, miss in missed:
        by_seed[seed].append(miss)
    means = {seed: statistics.fmean(misses) for seed, misses in by_seed.items()}
    fitted = sum(min(3, len(recipe.sizes())) for recipe in recipes)
    freedom = len(missed) - fitted - (len(means) - 1)
    if freedom <= 0 and len(means) == 1:
        return None
    own = sum((miss - means[seed]) ** 2 for seed, miss in missed)
    return Noise(
        seed=math.sqrt(sum(mean**2 for mean in means.values()) / (len(means) - 1)) if len(means) > 1 else 0.0,
        seeds=len(means),
        run=math.sqrt(own / freedom) if freedom > 0 else 0.0,
        freedom=max(0, freedom))


def _factor(rng: random.Random, freedom: int) -> float:
    """Draw the ratio of a true to an estimated standard deviation: sqrt(freedom / chi-square with `freedom` degrees)."""
    return math.sqrt(freedom / rng.gammavariate(freedom / 2, 2)) if freedom > 0 else 0.0
