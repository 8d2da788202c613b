"""Advice from runs of the same model on the same text: predicts losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.study.advice import confidence
from benchmarks.study.advice.advised import MOST_EXTRAPOLATION, Advice, Goal, Option, changes, distinct_titles, option
from benchmarks.study.advice.candidates import Candidate, candidates, is_dominated
from benchmarks.study.advice.fitting import Fits, fit_recipes
from benchmarks.study.advice.loss_curve import Curve
from benchmarks.study.advice.measured import MeasuredRun
from benchmarks.study.advice.ranking import rank
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError

_ROUNDING = 1.001
"""Factor by which a budget may fall short of a measured run's dollars and still count as equal."""


def predict(config: RunConfig, runs: Sequence[MeasuredRun], goal: Goal, notes: Sequence[str]) -> Advice:
    """Recommend the recipe with the lowest loss for a budget, or the lowest cost for a loss.

    Args:
        config: Configuration to advise on.
        runs: Measured runs with the configuration's model and text.
        goal: Dollars to spend, or a loss to reach.
        notes: Notes on runs that were left out before.

    Raises:
        ConfigError: No recipe is possible, or none was measured near enough to the goal.
        RunDirError: No recipe was measured at two sizes.
    """
    found = fit_recipes(runs)
    made, refused = candidates(config, found.recipes, scale_free=False)
    possible = [each for each in made if each.fits]
    if not possible:
        raise ConfigError("--from", None, f"no measured recipe can be carried out here ({refused[0]})")
    options = _options(found, possible, goal)
    if not options or options[0][0].dominated or _is_far(options, goal):
        raise _unanswered([(each, found.curves[each.at]) for each in possible if not is_dominated(each, possible)], goal)
    best, chosen = options[0]
    return Advice(
        name=config.name, goal=goal, sought="loss" if goal.kind == "budget_dollars" else "dollars",
        options=tuple(row for row, _ in options), settings=changes(config, chosen, best.tokens),
        confidence=confidence.weigh([
            confidence.reach(best.extrapolation, best.runs),
            confidence.shape(len(best.sizes), best.extrapolation),
            confidence.scatter(found.noise),
            confidence.lead(best.best_in, len(options))]),
        notes=(*notes, *refused))


def _options(found: Fits, possible: Sequence[Candidate], goal: Goal) -> list[tuple[Option, Candidate]]:
    """Predictions for the goal, best first and dominated recipes last; recipes without a prediction are left out."""

    def figures(curves: Sequence[Curve], miss: float) -> list[float]:
        return [_figure(each, curves[each.at], goal, miss) for each in possible]

    ranks = rank(figures(found.curves, 0.0), [figures(draw.curves, draw.miss) for draw in found.draws()])
    options = []
    for each, judged, title in zip(possible, ranks, distinct_titles(possible), strict=True):
        if not math.isfinite(judged.value):
            continue
        dollars = goal.value if goal.kind == "budget_dollars" else judged.value
        tokens = dollars / each.dollars_per_token
        row = option(
            title, each, judged, tokens, dollars, loss=found.curves[each.at].loss(tokens),
            extrapolation=tokens / each.recipe.largest, dominated=is_dominated(each, possible))
        options.append((judged.value, row, each))
    options.sort(key=lambda entry: (entry[1].dominated, entry[0]))
    return [(row, each) for _, row, each in options]


def _figure(candidate: Candidate, curve: Curve, goal: Goal, miss: float) -> float:
    """Loss for a budget, or dollars for a loss; infinity if too little was measured.

    Args:
        candidate: Candidate to evaluate.
        curve: Loss curve of the candidate's recipe.
        goal: Dollars to spend, or a loss to reach.
        miss: Deviation of the run's loss from the curve (nats per token).
    """
    recipe, price = candidate.recipe, candidate.dollars_per_token
    if goal.kind == "budget_dollars":
        tokens = goal.value / price
        # The curve does not hold below the recipe's smallest run: sub-models of only a few steps were not measured.
        return curve.loss(tokens) + miss if tokens * _ROUNDING >= recipe.smallest else math.inf
    tokens = max(curve.tokens(goal.value - miss), recipe.smallest)
    return tokens * price if tokens <= MOST_EXTRAPOLATION * recipe.largest else math.inf


def _is_far(options: Sequence[tuple[Option, Candidate]], goal: Goal) -> bool:
    return goal.kind == "budget_dollars" and all(row.extrapolation > MOST_EXTRAPOLATION for row, _ in options)


def _unanswered(usable: Sequence[tuple[Candidate, Curve]], goal: Goal) -> ConfigError:
    """The error for a goal without a recommendation: the reason, and what to do."""
    if goal.kind == "target_loss":
        least = min(curve.loss(MOST_EXTRAPOLATION * each.recipe.largest) for each, curve in usable)
        return ConfigError(
            goal.flag, goal.value,
            f"no recipe comes down to it within {MOST_EXTRAPOLATION:.0f} times its largest measured run, the best to {least:.3f}; "
            "raise it, or measure larger runs")
    smallest = min(each.dollars_per_token * each.recipe.smallest for each, _ in usable)
    if goal.value < smallest:
        return ConfigError(
            goal.flag, goal.value,
            f"is less than the smallest measured run costs here, {smallest:.4g} dollars; raise it, or measure smaller runs")
    largest = max(each.dollars_per_token * each.recipe.largest for each, _ in usable)
    return ConfigError(
        goal.flag, goal.value,
        f"is more than {MOST_EXTRAPOLATION:.0f} times what the largest measured run costs here, {largest:.4g} dollars; "
        "lower it, or measure larger runs")
