"""Runs of one subject as recipes with a curve each, and what chance does to those curves."""

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
from moedisco_ray.core.errors import RunDirError

POOL = "finetune.pool"
"""Where a gang trains decides what its tokens cost and never what comes out, so that it is no part of a recipe."""
_SYNC_EVERY = "submodels.sync_every"
DRAWS = 400
_SEED = 20_260_101


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What was measured of one recipe.

    Attributes:
        titles: For people, per pool that its gang was measured on; of a recipe without one, under None.
        settings: Dotted paths and values, all but the gang's pool and how often sub-models meet.
        sync_every: Steps between two rounds, where that is the same at all sizes; else None.
        rounds: Parts of a sub-model's training, as in its largest run; None where there are no rounds.
        reference: Whether it is what the others are compared with.
        runs: Of all its sizes.
    """

    titles: Mapping[str | None, str]
    settings: Mapping[str, Any]
    sync_every: int | None
    rounds: int | None
    reference: bool
    runs: tuple[MeasuredRun, ...]

    @property
    def key(self) -> str:
        """The same for the same recipe alone."""
        return json.dumps([self.settings, self.sync_every, self.rounds], sort_keys=True)

    @property
    def title(self) -> str:
        """One for all pools."""
        return min(self.titles.values())

    @property
    def smallest(self) -> int:
        """Tokens of its smallest run."""
        return min(run.tokens for run in self.runs)

    @property
    def largest(self) -> int:
        """Tokens of its largest run."""
        return max(run.tokens for run in self.runs)

    def sizes(self, loss: Callable[[MeasuredRun], float] = lambda run: run.loss) -> list[Size]:
        """Its sizes, the smallest first, with their mean losses."""
        by_tokens: dict[int, list[float]] = defaultdict(list)
        for run in self.runs:
            by_tokens[run.tokens].append(loss(run))
        return [Size(tokens, statistics.fmean(losses), len(losses)) for tokens, losses in sorted(by_tokens.items())]


@dataclasses.dataclass(frozen=True)
class Noise:
    """By how much a run's loss misses its recipe's curve, as standard deviations in nats.

    Attributes:
        seed: What all runs of a seed have in common, for they are measured on the same documents.
        seeds: How many there are.
        run: What each has of its own, the misfit of the curve included.
        freedom: Degrees of it: runs less the numbers that were fitted.
    """

    seed: float
    seeds: int
    run: float
    freedom: int

    def draw(self, chance: random.Random) -> tuple[float, float]:
        """Both deviations, as they may be given that they were estimated from so few."""
        return self.seed * _factor(chance, self.seeds - 1), self.run * _factor(chance, self.freedom)


@dataclasses.dataclass(frozen=True)
class Draw:
    """The curves as they could have come out as well.

    Attributes:
        curves: In the recipes' order.
        miss: By how many nats one more run misses its curve.
    """

    curves: tuple[Curve, ...]
    miss: float


@dataclasses.dataclass(frozen=True)
class Study:
    """All recipes that were measured on one subject.

    Attributes:
        subject: The subject.
        recipes: By their keys.
        curves: Of each.
        noise: None where there is one run per fitted number, so that it is unknown.
    """

    subject: Mapping[str, Any]
    recipes: tuple[Recipe, ...]
    curves: tuple[Curve, ...]
    noise: Noise | None

    def draws(self) -> list[Draw]:
        """`DRAWS` of them, always the same: a parametric bootstrap. None where the noise is not known.

        Every run gets a new loss, its curve's and a deviation of its seed and one of its own, and all is fitted again. The slope
        of a recipe with one size is that of another recipe, chosen anew each time.
        """
        if self.noise is None:
            return []
        chance = random.Random(_SEED)
        return [self._draw(self.noise, chance) for _ in range(DRAWS)]

    def _draw(self, noise: Noise, chance: random.Random) -> Draw:
        of_seed, of_run = noise.draw(chance)
        seeds: dict[int, float] = defaultdict(lambda: chance.gauss(0, of_seed))

        def again(curve: Curve) -> Callable[[MeasuredRun], float]:
            return lambda run: curve.loss(run.tokens) + seeds[run.seed] + chance.gauss(0, of_run)

        sizes = [recipe.sizes(again(curve)) for recipe, curve in zip(self.recipes, self.curves, strict=True)]
        curves = fit_all(sizes, lambda others: [chance.choice(others)])
        return Draw(tuple(curves), chance.gauss(0, math.hypot(of_seed, of_run)))


def study(runs: Iterable[MeasuredRun]) -> Study:
    """Fit every recipe of one subject.

    Args:
        runs: In any order.

    Raises:
        RunDirError: No recipe was measured at two sizes, so that the fall of the loss is unknown.
    """
    ordered = sorted(runs, key=lambda run: run.identity)
    recipes = tuple(sorted(_recipes(ordered), key=lambda recipe: recipe.key))
    sizes = [recipe.sizes() for recipe in recipes]
    if all(len(each) < 2 for each in sizes):
        raise RunDirError(
            "--from", None, "every recipe was measured at one number of tokens only, which does not tell how its loss falls; "
            "add a run with more tokens")
    curves = fit_all(sizes, lambda others: others)
    return Study(ordered[0].subject, recipes, tuple(curves), _noise(recipes, curves))


def fit_all(sizes: Sequence[Sequence[Size]], like: Callable[[list[Curve]], list[Curve]]) -> list[Curve]:
    """A curve per recipe; one that was measured at one size only is as steep as others.

    Args:
        sizes: Of each recipe.
        like: Which of the curves of the others.
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
    """Split runs that differ in how often sub-models meet, if at all.

    One recipe keeps its rounds at every size, another its steps between them. The group is read in the way that makes fewer
    recipes of it, and so longer curves; where both make as many, rounds are what is kept.
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


def _factor(chance: random.Random, freedom: int) -> float:
    """The root of freedom over a chi-square of so much: what an estimated deviation may truly be, as a multiple of the estimate."""
    return math.sqrt(freedom / chance.gammavariate(freedom / 2, 2)) if freedom > 0 else 0.0
