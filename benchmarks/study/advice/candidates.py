"""Applies measured recipes to a configuration: their settings, whether they fit, and their cost per token."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.advice.fitting import POOL, Recipe
from moedisco_ray.core.config import PoolName, RunConfig, check_config, put
from moedisco_ray.core.errors import ConfigError, UserError
from moedisco_ray.plan.build import build_plan

SCALE_FREE = (
    "tokens.seed_share", "tokens.finetune_share",
    "clusters.count", "clusters.method", "clusters.vectors", "clusters.capacity",
    "submodels.optimizer.schedule", "submodels.optimizer.warmup", "submodels.outer.lr",
    "submodels.outer.momentum", "submodels.keep_optimizer_state",
    "merge.backbone", "merge.router",
    "finetune.optimizer.schedule", "finetune.optimizer.warmup",
    "finetune.load_balance", "finetune.z_loss", "finetune.keep_optimizer_state")
"""Settings that mean the same for a model of another size: choices, shares and multiples. Learning rates, batch sizes and steps do
not; the number of rounds in a sub-model's training does."""

_POOLS: tuple[PoolName | None, ...] = ("high_memory", "low_memory", None)
_EQUAL_DOLLARS = 1.001
"""Maximum cost ratio of two runs that were planned to cost the same."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe applied to the given configuration.

    Attributes:
        title: Title for people.
        recipe: The recipe as measured.
        at: Index of the recipe among all recipes.
        settings: Settings of the recipe, except `sync_every`.
        sync_every: Steps between two sync points; None: derived from the recipe's number of sync points, or no sync points.
        dollars_per_token: Cost per token with the configuration's prices and model.
        fits: Whether the workers have enough memory.
    """

    title: str
    recipe: Recipe
    at: int
    settings: Mapping[str, Any]
    sync_every: int | None
    dollars_per_token: float
    fits: bool

    @property
    def key(self) -> str:
        """Key that is equal for candidates with equal settings."""
        return json.dumps([self.settings, self.sync_every, self.recipe.rounds], sort_keys=True)

    def configure(self, config: RunConfig, tokens: int) -> RunConfig:
        """The configuration with this recipe and a number of tokens.

        Raises:
            UserError: The configuration does not allow the recipe.
        """
        return _configured(config, self.settings, self.sync_every, self.recipe.rounds, tokens)

    def points(self) -> list[tuple[float, float]]:
        """Dollars at the configuration's prices, and mean loss, for each measured size.

        Runs at equal dollars had equal total cost. Their dollars therefore include what the recipe reads outside training, in the
        measured proportion.
        """
        reading = defaultdict[int, list[float]](list)
        for run in self.recipe.runs:
            reading[run.tokens].append(run.reading_share)
        return [
            (size.tokens * self.dollars_per_token * (1 + statistics.fmean(reading[size.tokens])), size.loss)
            for size in self.recipe.sizes()]


def candidates(config: RunConfig, recipes: Sequence[Recipe], *, scale_free: bool) -> tuple[list[Candidate], list[str]]:
    """Apply the recipes to a configuration.

    A gang trains on the pool on which it was measured, and also on the pool that the configuration sets. It is not moved to the
    cheap pool otherwise: the traffic between its workers is slow there, and the plan does not count it.

    Args:
        config: Configuration to advise on.
        recipes: Measured recipes.
        scale_free: Whether to use only settings that mean the same for a model of another size.

    Returns:
        The candidates; and for each recipe that is not possible or does not fit as measured, a line with the reason.

    Raises:
        ConfigError: Training costs nothing at the configuration's prices.
    """
    found: list[Candidate] = []
    refused = []
    for (at, recipe), pool in itertools.product(enumerate(recipes), _POOLS):
        if pool not in recipe.titles and (pool != config.finetune.pool or None in recipe.titles):
            continue
        title = recipe.titles.get(pool) or f"{recipe.title}, moved to {str(pool).replace('_', '-')}"
        settings = {path: value for path, value in recipe.settings.items() if not scale_free or path in SCALE_FREE}
        if pool is not None:
            settings[POOL] = pool
        sync_every = None if scale_free else recipe.sync_every
        try:
            plan = build_plan(_configured(config, settings, sync_every, recipe.rounds, config.tokens.total))
        except UserError as error:
            if pool in recipe.titles:
                refused.append(f"{title}: {error}")
            continue
        if not plan.training_dollars:
            raise ConfigError("pools", None, "training costs nothing, so there is nothing to weigh; give the pools prices")
        found.append(Candidate(title, recipe, at, settings, sync_every, plan.training_dollars / plan.tokens, plan.fits))
        if pool in recipe.titles:
            refused += [
                f"{title}: {stage.stage} does not fit {stage.pool}: {stage.remedy}" for stage in plan.stages if not stage.fits][:1]
    return found, refused


def is_dominated(one: Candidate, others: Sequence[Candidate]) -> bool:
    """Whether at every measured size of `one` another recipe had a lower loss for no more dollars.

    Its curve may be steeper and cross the other's far outside of the measurements, but no measurement supports that.
    """
    return any(
        all(any(dollars <= spent * _EQUAL_DOLLARS and reached < loss for dollars, reached in other.points())
            for spent, loss in one.points())
        for other in others if other is not one)


def _configured(
    config: RunConfig, settings: Mapping[str, Any], sync_every: int | None, rounds: int | None, tokens: int,
) -> RunConfig:
    raw = config.model_dump(mode="json")
    for path, value in {**settings, "tokens.total": tokens}.items():
        put(raw, path, value)
    if "merge.backbone" in settings:
        raw["submodels"]["sync_every"] = None
    once = check_config(raw)
    if rounds is None:
        return once
    steps = next(stage.steps for stage in build_plan(once).stages if stage.stage == "submodels")
    raw["submodels"]["sync_every"] = sync_every or max(1, -(-steps // rounds))
    return check_config(raw)
