"""Other ways to train a run's model on the same tokens and machines, each planned as a run of its own.

All have the run's recipe, cards, prices and network: only the tokens of the phases, the pool of the fine-tune and the
number of its workers differ. So a plan can say which way is cheapest on these machines, also if that is another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import is_joint_training
from moedisco_ray.core.records.ways import THIS_RUN, WHOLE, Alternative, Way, exact_first
from moedisco_ray.plan.joint_ways import Change, Joint, Planner, Trial, joint_trials, joint_ways, tried
from moedisco_ray.plan.member_ways import members_way

_GAPS: Mapping[Way, float] = {
    "joint_high_memory": 0.0,
    "joint_low_memory": 0.0,
    "streamed": 0.0,
    "grown": 0.03,
    "without_submodels": 0.07,
    "half": 0.07,
    "submodels": 0.08,
}
"""Gap of each way from random weights: 16 experts, 8.5 tokens per parameter, one seed (docs/results.md)."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The way that `recipe` chose.

    Attributes:
        way: The way; `submodels` if it is what `tokens` says.
        name: The way in words.
        change: The settings that it changes.
        reason: Why it was chosen, in words.
    """

    way: Way
    name: str
    change: Change
    reason: str


def alternatives(config: RunConfig, run: Trial, plan: Planner, chosen: Chosen | None = None) -> tuple[Alternative, ...]:
    """All ways to train the run's model, the run itself last.

    Args:
        config: The configuration before a recipe changed it, with a number of clusters.
        run: The plan of the run itself.
        plan: Function that plans another configuration.
        chosen: What the recipe chose; None without a recipe.
    """
    found: list[Alternative] = []
    for trials in joint_trials(config, plan):
        for each in _shown(trials):
            if chosen is not None and chosen.change == each.change:
                continue  # the run itself
            found.append(_row(each.way, each.name, each.trial, each.size))
    members = members_way(config, plan)
    if isinstance(members, Joint) and (chosen is None or chosen.change != members.change):
        found.append(_row(members.way, members.name, members.trial, members.size))
    way = "run" if chosen is None else chosen.way
    others: list[tuple[Way, str, Change]] = []
    if config.model.init == "random":
        others += [("grown", GROWN_NAME, GROWN), *_half(config)]
    if config.tokens.decoupled and config.tokens.seed:
        others.append(("without_submodels", "training without sub-models", _without_submodels(config)))
    if config.tokens.decoupled and way != "run":
        others.append(("submodels", "training with sub-models", {}))
    found += [
        _row(each, name, tried(config, plan, change), run.workers) for each, name, change in others if each != way
    ]
    known = _GAPS if config.model.init == "random" else dict.fromkeys(WHOLE, 0.0)
    found = [each.model_copy(update={"gap": known.get(each.way)}) for each in found]
    name = THIS_RUN if chosen is None else f"{THIS_RUN}: {chosen.name}"
    itself = way in WHOLE or is_joint_training({"seed": config.tokens.seed, "submodels": config.tokens.submodels})
    gap = 0.0 if itself else known.get(way)
    found.append(_row("run", name, run, run.workers).model_copy(update={"gap": gap}))
    return tuple(found)


GROWN: Change = {"tokens": {"seed_share": 0.5, "finetune_share": 0.5}, "export": {"keep_apart": "auto"}}
GROWN_NAME = "growing to all experts in the middle"


def _without_submodels(config: RunConfig) -> Change:
    seed_share = round(1 - config.tokens.finetune_share, 12)
    return {"tokens": {"seed_share": seed_share}, "export": {"keep_apart": "auto"}}


def _half(config: RunConfig) -> Iterator[tuple[Way, str, Change]]:
    """Joint training of a model with half of the experts, on the smaller cards."""
    sizes = config.model.architecture
    half = sizes.num_experts // 2
    if sizes.num_experts % 2 or half < sizes.num_experts_per_tok:
        return
    for cards in joint_ways(config):
        if cards.way == "joint_low_memory":
            model = config.model.model_dump() | {"config": sizes.model_copy(update={"num_experts": half}).model_dump()}
            yield (
                "half",
                f"{half} experts instead of {sizes.num_experts}, on 1 x {cards.name}",
                {**cards.change(1), "model": model, "clusters": {"count": 1}},
            )
            return


def _shown(trials: Sequence[Joint]) -> Iterator[Joint]:
    """The fewest workers that fit, the number that costs least, and the most; the most alone if no number fits."""
    fitting = {each.size: each for each in trials if each.fits}
    if not fitting:
        yield trials[-1]
        return
    cheapest = min(exact_first(list(fitting.values())), key=lambda each: each.cost).size
    yield from (fitting[size] for size in sorted({min(fitting), cheapest, max(fitting)}))


def _row(way: Way, name: str, trial: Trial | str, workers: int) -> Alternative:
    if isinstance(trial, str):
        return Alternative(way=way, name=name, workers=workers, seconds=None, dollars=None, memory_gb=None, limit=trial)
    return Alternative(
        way=way,
        name=name,
        workers=trial.workers,
        seconds=trial.seconds,
        dollars=trial.bill.dollars,
        kilowatt_hours=trial.kilowatt_hours,
        rounded=trial.rounded,
        memory_gb=trial.memory_gb,
        limit=trial.limit,
    )
