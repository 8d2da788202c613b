"""Measured recipes as changes of a configuration: what they set there, whether they can, and what a token costs by them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.advice.study import POOL, Recipe
from moedisco_ray.core.config import PoolName, RunConfig, check_config, put
from moedisco_ray.core.errors import ConfigError, UserError
from moedisco_ray.plan.build import build_plan

SCALE_FREE = (
    "tokens.seed_share", "tokens.finetune_share",
    "clusters.count", "clusters.method", "clusters.vectors", "clusters.capacity", "clusters.overlap",
    "submodels.optimizer.schedule", "submodels.optimizer.warmup", "submodels.outer.lr",
    "submodels.outer.momentum", "submodels.keep_optimizer_state",
    "merge.backbone", "merge.router",
    "finetune.optimizer.schedule", "finetune.optimizer.warmup",
    "finetune.load_balance", "finetune.z_loss", "finetune.keep_optimizer_state")
"""What is a choice, a share or a multiple, and so means the same for a model of another size. Learning rates, batches and steps do
not; rounds do, as a number of parts of a sub-model's training."""

_POOLS: tuple[PoolName | None, ...] = ("high_memory", "low_memory", None)
_EQUAL_DOLLARS = 1.001
"""Runs whose tokens were chosen to cost as much as another's differ by less."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe, on the configuration that is advised.

    Attributes:
        title: For people.
        recipe: As measured.
        at: The recipe's place among all.
        settings: What it sets, how often sub-models meet apart.
        sync_every: Steps between two sync points; None: the number that gives the recipe's sync points, or there are none.
        dollars_per_token: By the configuration's prices and model.
        fits: Whether its workers have the memory.
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
        """The same for what sets the same."""
        return json.dumps([self.settings, self.sync_every, self.recipe.rounds], sort_keys=True)

    def configure(self, config: RunConfig, tokens: int) -> RunConfig:
        """The configuration with this recipe and a number of tokens.

        Raises:
            UserError: It does not allow for the recipe.
        """
        return _configured(config, self.settings, self.sync_every, self.recipe.rounds, tokens)

    def points(self) -> list[tuple[float, float]]:
        """Dollars, by the configuration's prices, and mean loss at each size that was measured.

        Runs for as many dollars were given as many of the whole account, so that what a recipe reads outside its training is in
        these, in the proportion in which it was measured.
        """
        beside = defaultdict[int, list[float]](list)
        for run in self.recipe.runs:
            beside[run.tokens].append(run.beside)
        return [
            (size.tokens * self.dollars_per_token * (1 + statistics.fmean(beside[size.tokens])), size.loss)
            for size in self.recipe.sizes()]


def candidates(config: RunConfig, recipes: Sequence[Recipe], *, scale_free: bool) -> tuple[list[Candidate], list[str]]:
    """What the recipes would be on a configuration.

    A gang trains where it was measured, and also where the configuration has its own. It is not moved to the cheap pool unasked:
    what a plan does not count, the traffic between its workers, is what that pool is bad at.

    Args:
        config: That is advised.
        recipes: As measured.
        scale_free: Take over only what means the same for a model of another size.

    Returns:
        The candidates; and why others are none, or do not fit, a line each, where they are as measured.

    Raises:
        ConfigError: Training costs nothing.
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
    """Whether another recipe had a lower loss for no more dollars wherever this one was measured.

    Its curve may still be the steeper one, and cross the other's far away: nothing that was measured speaks for that.
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
