"""Advice from runs of other models of the family, or on other text: the cost of each recipe relative to joint training.

The cost is in dollars to reach the loss that joint training reached in the measurement. The tokens for it come from the
measurement; the cost per token comes from the configuration: its prices, its pools and its model, in which a sub-model may be a
larger or smaller part of the whole. Recipes are compared on `common_ground`, because joint training is easier to beat on some
subjects than on others; recipes that no chain of subjects links are compared only with joint training.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.study.advice import common_ground, confidence
from benchmarks.study.advice.advised import MOST_EXTRAPOLATION, Advice, Goal, Option, changes, distinct_titles, option
from benchmarks.study.advice.candidates import Candidate, candidates, is_dominated
from benchmarks.study.advice.fitting import DRAWS, POOL, Draw, Fits, fit_recipes
from benchmarks.study.advice.loss_curve import Curve
from benchmarks.study.advice.measured import MeasuredRun
from benchmarks.study.advice.ranking import rank
from benchmarks.study.recipe import Subject
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError, RunDirError

_SEED = 20_260_102
_MOST_BELOW = 4.0
"""Maximum factor by which a recipe can need fewer tokens than its smallest run, if that run is already below the loss sought."""


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """The recipes of one subject, compared with joint training on that subject.

    Attributes:
        fits: Measured recipes of the subject.
        made: The recipes as candidates for the given configuration.
        joint: Index of joint training among the recipes.
        joint_rate: Joint training's dollars per token for the given configuration.
        draws: Bootstrap samples of the study.
    """

    fits: Fits
    made: tuple[Candidate, ...]
    joint: int
    joint_rate: float
    draws: tuple[Draw, ...]

    @property
    def possible(self) -> list[Candidate]:
        """Candidates that are possible."""
        return [each for each in self.made if each.fits]

    @property
    def parameters(self) -> int:
        """Parameters of the measured model."""
        return self.fits.subject.parameters

    def token_ratio(self, recipe: int, curves: Sequence[Curve]) -> float:
        """Tokens to reach joint training's measured losses, relative to joint training (geometric mean)."""
        if recipe == self.joint:
            return 1.0
        logs = []
        for size in self.fits.recipes[self.joint].sizes():
            needed = self.tokens_to(recipe, curves, curves[self.joint].loss(size.tokens))
            if not math.isfinite(needed):
                return math.inf
            logs.append(math.log(needed / size.tokens))
        return math.exp(statistics.fmean(logs))

    def tokens_to(self, recipe: int, curves: Sequence[Curve], loss: float) -> float:
        """Tokens for a recipe to reach a loss, limited below its smallest run, and infinity far beyond its largest run."""
        measured = self.fits.recipes[recipe]
        tokens = max(curves[recipe].tokens(loss), measured.smallest / _MOST_BELOW)
        return tokens if tokens <= MOST_EXTRAPOLATION * measured.largest else math.inf

    def extrapolation(self, recipe: int) -> float:
        """Extrapolation factor from the recipe's runs to the tokens with which it reaches joint training's measured losses."""
        curves, measured = self.fits.curves, self.fits.recipes[recipe]
        needed = [
            self.tokens_to(recipe, curves, curves[self.joint].loss(size.tokens)) for size in self.fits.recipes[self.joint].sizes()]
        return max(max(needed) / measured.largest, measured.smallest / min(needed))


@dataclasses.dataclass(frozen=True)
class _SharedRecipe:
    """One recipe in all the comparisons that have it.

    Attributes:
        candidate: The recipe on the given configuration, with the runs of all comparisons.
        by_comparison: The recipe's candidates by comparison; several in one if they differ in settings that do not carry over.
        joint: Whether the recipe is joint training in each comparison.
    """

    candidate: Candidate
    by_comparison: Mapping[int, Sequence[Candidate]]
    joint: bool

    @property
    def training(self) -> str | None:
        """Key that is equal for recipes that differ only in the gang's pool; None for joint training, the reference."""
        settings = {path: value for path, value in self.candidate.settings.items() if path != POOL}
        return None if self.joint else dataclasses.replace(self.candidate, settings=settings).key


def transfer(
    config: RunConfig, own: Subject, runs: Sequence[MeasuredRun], goal: Goal, notes: Sequence[str],
) -> Advice:
    """Recommend the recipe with the lowest cost to reach joint training's loss.

    Args:
        config: Configuration to advise on.
        own: Subject of the configuration.
        runs: Measured runs on other subjects of the same family.
        goal: Dollars to spend.
        notes: Notes on runs that were left out before.

    Raises:
        ConfigError: No recipe is possible.
        RunDirError: No comparison shows which loss joint training reaches.
    """
    comparisons, refused = _comparisons(config, runs)
    shared = _shared_recipes(comparisons)
    if not shared:
        raise ConfigError("--from", None, f"no measured recipe can be carried out here ({refused[0]})")
    rows = sorted(_options(comparisons, shared, goal), key=lambda pair: (pair[0].dominated, pair[0].ratio))
    if not rows or rows[0][0].dominated:
        raise RunDirError("--from", None, "no recipe that is possible here reaches joint training's loss; measure larger runs")
    best, chosen = rows[0]
    noises = [one.fits.noise for one in comparisons if one.fits.noise is not None]
    return Advice(
        name=config.name, goal=goal, sought="ratio", options=tuple(row for row, _ in rows),
        settings=changes(config, chosen.candidate, best.tokens),
        confidence=confidence.weigh([
            confidence.likeness(_size_ratio([one.parameters for one in comparisons], own.parameters), len(comparisons)),
            confidence.duration(_range_ratio(
                best.tokens / own.parameters, [size / one.parameters for one in comparisons for size in _sizes(one)])),
            confidence.reach(best.extrapolation, best.runs),
            confidence.shape(len(best.sizes), best.extrapolation),
            confidence.scatter(min(noises, key=lambda noise: noise.seeds, default=None)),
            confidence.lead(best.best_in, len(rows)),
            confidence.pairing(
                {row.title: len(chosen.by_comparison.keys() & each.by_comparison.keys()) for row, each in rows[1:]},
                len(comparisons))]),
        notes=(*notes, *refused))


def _options(
    comparisons: Sequence[_Comparison], shared: Sequence[_SharedRecipe], goal: Goal,
) -> list[tuple[Option, _SharedRecipe]]:
    """Result of each recipe for the budget; recipes that do not reach joint training's loss are left out."""
    fitted = _ratios(comparisons, shared, [one.fits.curves for one in comparisons], range(len(comparisons)))
    titles = distinct_titles([each.candidate for each in shared])
    found = []
    for each, judged, title in zip(shared, rank(fitted, _draws(comparisons, shared)), titles, strict=True):
        if not math.isfinite(judged.value):
            continue
        row = option(
            title, each.candidate, judged, goal.value / each.candidate.dollars_per_token, goal.value, ratio=judged.value,
            extrapolation=max(
                min(comparisons[at].extrapolation(candidate.at) for candidate in members)
                for at, members in each.by_comparison.items()),
            dominated=all(
                is_dominated(candidate, comparisons[at].possible)
                for at, members in each.by_comparison.items() for candidate in members))
        found.append((row, each))
    return found


def _draws(comparisons: Sequence[_Comparison], shared: Sequence[_SharedRecipe]) -> list[list[float]]:
    """Bootstrap samples of the ratios, over the noise of runs and over the choice of measured subjects."""
    if len(comparisons) == 1 and not comparisons[0].draws:
        return []
    rng = random.Random(_SEED)
    return [
        _ratios(
            comparisons, shared, [one.draws[i].curves if one.draws else one.fits.curves for one in comparisons],
            rng.choices(range(len(comparisons)), k=len(comparisons)))
        for i in range(DRAWS)]


def _ratios(
    comparisons: Sequence[_Comparison], shared: Sequence[_SharedRecipe], curves: Sequence[Sequence[Curve]],
    chosen: Sequence[int],
) -> list[float]:
    """Dollars of each recipe to reach joint training's loss, relative to joint training.

    Args:
        comparisons: Comparisons of all subjects.
        shared: Recipes to rate.
        curves: Curves of each comparison's recipes.
        chosen: Comparisons to use; each counts once for every time it is listed. A recipe that was measured in none of them uses
            all comparisons in which it was measured.
    """
    table: dict[str | None, dict[int, float]] = defaultdict(dict)
    for each in shared:
        row = table[each.training]
        for at, members in each.by_comparison.items():
            # Of recipes that differ in settings that do not carry over, such as learning rates, the best one counts.
            tokens = min(comparisons[at].token_ratio(candidate.at, curves[at]) for candidate in members)
            row[at] = min(row.get(at, math.inf), math.log(tokens))
    # Joint training's own ratios are 1 on every subject, so they contain no information about it.
    shifts = common_ground.shifts([row for training, row in table.items() if training is not None], chosen, len(comparisons))
    rates = [each.candidate.dollars_per_token / comparisons[0].joint_rate for each in shared]
    return [
        math.exp(common_ground.mean(table[each.training], shifts, chosen)) * rate
        for each, rate in zip(shared, rates, strict=True)]


def _comparisons(config: RunConfig, runs: Sequence[MeasuredRun]) -> tuple[list[_Comparison], list[str]]:
    by_subject: dict[str, list[MeasuredRun]] = defaultdict(list)
    for run in runs:
        by_subject[json.dumps(run.subject.to_json(), sort_keys=True)].append(run)
    comparisons, refused = [], []
    for _, group in sorted(by_subject.items()):
        if not any(run.reference for run in group):
            refused.append("runs of another model: no joint training among them")
            continue
        try:
            found = fit_recipes(group)
        except RunDirError as error:
            refused.append(f"runs of another model: {error.remedy}")
            continue
        made, unfit = candidates(config, found.recipes, scale_free=True)
        joint = next(i for i, recipe in enumerate(found.recipes) if recipe.reference)
        refused += unfit
        rates = [each.dollars_per_token for each in made if each.at == joint and each.settings[POOL] == "high_memory"]
        if rates:
            comparisons.append(_Comparison(found, tuple(made), joint, rates[0], tuple(found.draws())))
    if not comparisons:
        raise RunDirError("--from", None, f"{refused[0]}; `python -m benchmarks.study compare` makes all that is needed")
    return comparisons, sorted(set(refused))


def _shared_recipes(comparisons: Sequence[_Comparison]) -> list[_SharedRecipe]:
    by_comparison: dict[str, dict[int, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for at, one in enumerate(comparisons):
        for each in one.possible:
            by_comparison[each.key][at].append(each)
    return [
        _SharedRecipe(
            _pooled([candidate for members in each.values() for candidate in members]), each,
            joint=all(any(candidate.at == comparisons[at].joint for candidate in members) for at, members in each.items()))
        for _, each in sorted(by_comparison.items())]


def _pooled(members: Sequence[Candidate]) -> Candidate:
    """One candidate with the runs of all members."""
    recipe = dataclasses.replace(members[0].recipe, runs=tuple(run for each in members for run in each.recipe.runs))
    return dataclasses.replace(members[0], recipe=recipe, title=min(each.title for each in members))


def _sizes(one: _Comparison) -> list[int]:
    return [size.tokens for recipe in one.fits.recipes for size in recipe.sizes()]


def _size_ratio(measured: Sequence[int], own: int) -> float:
    """Ratio between a model's parameter count and the nearest measured one."""
    return min(max(each / own, own / each) for each in measured)


def _range_ratio(rate: float, measured: Sequence[float]) -> float:
    """Ratio between a rate and the nearest end of the measured range; 1 inside the range."""
    return max(1.0, rate / max(measured), min(measured) / rate)
