"""Choose the way to train a model that `recipe` means on a run's pools.

The whole MoE in one phase, joint training, has the lowest loss at equal tokens, so it is taken wherever it fits, on the
cards that cost least for it. A seed with a part of the experts, which grows to all experts in the middle, takes its
place where that reaches the same loss for less: where the MoE fits large cards alone, and the seed cheap ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.ways import EXACT_COST, SAME_COST, exact_first
from moedisco_ray.plan.alternatives import GROWN, GROWN_NAME, Chosen
from moedisco_ray.plan.joint_ways import Joint, Planner, Trial, cost_of_trial, joint_trials, tried
from moedisco_ray.plan.member_ways import members_way

_GROWN_TOKENS = 1.11
"""Tokens with which growing at the middle reaches the loss of joint training, relative to joint training's: it ends
0.03 nats behind, and twice the tokens are taken to gain 0.2."""


def choose(config: RunConfig, plan: Planner) -> Chosen | None:
    """The way that `recipe` means on these pools; None without a recipe.

    Args:
        config: The configuration, with a number of clusters.
        plan: Function that plans another configuration.

    Raises:
        ConfigError: The recipe is impossible, such as `joint` if the MoE fits no pool.
    """
    if config.recipe is None:
        return None
    if config.recipe == "auto" and keeps_submodels(config):
        return Chosen("submodels", "sub-models", {}, "data owners, adapters and ensembles need sub-models")
    grown = tried(config, plan, GROWN)
    if config.recipe in ("grown", "members"):
        return _grown(grown) if config.recipe == "grown" else _members(config, plan)
    kinds = list(joint_trials(config, plan))
    joint = [each for kind in kinds for each in kind if each.fits]
    if not joint:
        limits = [f"{kind[-1].name}: {kind[-1].limit}" for kind in kinds]
        if config.recipe == "joint":
            raise ConfigError("recipe", "joint", f"fits no pool ({'; '.join(limits)}); choose another recipe, or pools")
        return Chosen("submodels", "sub-models", {}, f"the whole model fits no pool ({'; '.join(limits)})")
    ways = exact_first(joint)
    best = _best(ways)
    grows = config.recipe == "auto" and isinstance(grown, Trial) and grown.limit is None
    if grows and 0 < _cost_of_growing(grown, ways) < min(each.cost[0] for each in ways) < math.inf:
        more = f"{100 * (_GROWN_TOKENS - 1):.0f} % more tokens"
        return Chosen("grown", GROWN_NAME, GROWN, f"with {more} it reaches the loss of {best.name} for less")
    return Chosen(best.way, best.name, best.change, _reason(best, joint, ways))


def _grown(trial: Trial | str) -> Chosen:
    if isinstance(trial, str):
        raise ConfigError("recipe", "grown", f"is impossible ({trial}); choose another recipe")
    return Chosen("grown", GROWN_NAME, GROWN, "the configuration says so")


def _members(config: RunConfig, plan: Planner) -> Chosen:
    found = members_way(config, plan)
    limit = found if isinstance(found, str) else found.limit
    if isinstance(found, str) or limit is not None:
        raise ConfigError("recipe", "members", f"is impossible ({limit}); choose another recipe")
    reason = "the configuration says so; how much higher its loss ends is not known"
    return Chosen("members", found.name, found.change, reason)


def _cost_of_growing(grown: Trial | str, ways: Sequence[Joint]) -> float:
    """Dollars until a growing seed has the loss of joint training; more of them if it alone has to round to fit."""
    rounds_alone = isinstance(grown, Trial) and grown.rounded and not any(each.rounded for each in ways)
    return cost_of_trial(grown)[0] * _GROWN_TOKENS * (EXACT_COST if rounds_alone else 1.0)


def _best(joint: Sequence[Joint]) -> Joint:
    """The fastest of the ways that cost about as little as the cheapest.

    One worker does not become workers on several machines: what they exchange over the network takes a time that is
    only planned.
    """
    cheapest = min(joint, key=lambda each: (each.cost, each.pool == "high_memory", each.way == "streamed", each.size))
    near = [each for each in joint if each.nodes == 1 or cheapest.size > 1]
    near = [each for each in near if each.cost[0] <= SAME_COST * cheapest.cost[0] < math.inf]
    return min(near, key=lambda each: each.cost[::-1], default=cheapest)


def _reason(best: Joint, joint: Sequence[Joint], ways: Sequence[Joint]) -> str:
    rounding = [each for each in joint if each not in ways and each.cost < best.cost]
    if rounding:
        return f"the whole model fits there as it is, and {min(rounding, key=lambda each: each.cost).name} has to round"
    if best.way != "streamed":
        return "the whole model fits there"
    if all(each.way == "streamed" for each in joint):
        return "the whole model fits the machine's main memory, and no cards"
    if best.cost[0] == math.inf:
        return "the whole model fits there, and what the ways cost on CPUs is unknown before the run"
    return f"that {'costs less' if best.cost[0] else 'takes less time'} than with the weights on cards"


def keeps_submodels(config: RunConfig) -> bool:
    """Whether a run needs sub-models, so that `recipe: auto` trains them whatever they cost."""
    return bool(config.owners or config.submodels.lora.rank or config.export.keep_apart == "always")
