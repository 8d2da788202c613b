"""Other ways to train a run's model on the same tokens and machines, each planned as a run of its own.

All have the run's recipe, cards, prices and network: only the tokens of the phases, the pool of the fine-tune and the
number of its workers differ. So a plan can say which way is cheapest on these machines, also if that is another one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import Baseline, format_dollars, format_seconds, is_joint_training
from moedisco_ray.plan.joint_ways import (
    WHOLE,
    WORKER,
    Change,
    Joint,
    Planner,
    Trial,
    Way,
    exact_first,
    joint_trials,
    joint_ways,
    tried,
)
from moedisco_ray.plan.member_ways import members_way

_THIS_RUN = "this run"
SAME_COST = 1.02
"""Ratio of two costs up to which the time decides."""
_ROUNDED = {"bf16": "weights in bf16", "fp8": "optimizer state in fp8", "blocks": "updates in blocks"}
"""What a way rounds or divides, in words."""
_MUCH_CHEAPER = 0.9
"""Largest cost or time of a way with a higher loss, relative to the run's, from which on a verdict mentions it."""
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


NOT_COMPARED: tuple[Way, ...] = ("members", "half")
"""Ways that no verdict recommends: how much higher the loss ends is not known, or the model is another one."""


class Alternative(BaseModel, frozen=True, defer_build=True):
    """A way to train the model on the run's tokens, and what it needs."""

    way: Way
    """`joint_high_memory` and `joint_low_memory` train the whole model in one phase on that pool, and `streamed` on one
    card of a pool, with the weights in main memory. `members` train it on a card of each machine, and exchange what
    their weights change by every few steps. `grown` trains a seed with a part of the experts, and all experts from the
    middle on; `without_submodels` gives the tokens of the sub-models to the seed; `half` trains another model, with
    half of the experts, in one phase. `submodels` is what `tokens` says where `recipe` chose another way, and `run` is
    the run itself."""
    name: str
    """The way in words, with its cards."""
    workers: int
    """Largest number of workers at the same time."""
    seconds: float | None
    """Wall-clock time in seconds, without text processing if its time is unknown; null if the way does not fit, or if
    the speed of its workers is unknown."""
    dollars: float | None
    """Cost in dollars; null if it does not fit, or if it is unknown."""
    kilowatt_hours: float | None = None
    """Energy that the cards take while they work; null if it does not fit, or if a card is not named."""
    gap: float | None = None
    """Loss above that of joint training at equal tokens (nats), as measured with small models (docs/results.md); null
    if it is not known."""
    rounded: tuple[str, ...] = ()
    """What a plan rounds or divides to make it fit: `bf16` weights, optimizer state in `fp8`, or updates of `blocks`.
    The loss that this costs is not in `gap`."""
    memory_gb: float | None
    """Memory of the largest worker (GiB), of the settings that lack least if none that a plan may choose make it fit;
    null if the configuration does not allow the way."""
    limit: str | None
    """Why this way is impossible; null if it is not."""

    @property
    def cost(self) -> tuple[float, float]:
        """Dollars and seconds; infinite where they are not known."""
        return math.inf if self.dollars is None else self.dollars, math.inf if self.seconds is None else self.seconds


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


def alternatives(
    config: RunConfig, run: Trial, plan: Planner, chosen: Chosen | None = None
) -> tuple[tuple[Alternative, ...], Baseline | None]:
    """All ways to train the run's model, the run itself last.

    Args:
        config: The configuration before a recipe changed it, with a number of clusters.
        run: The plan of the run itself.
        plan: Function that plans another configuration.
        chosen: What the recipe chose; None without a recipe.

    Returns:
        The ways, and the cheapest joint training on the high-memory pool as the baseline of the run's bill; None if
        none fits, if the run is joint training itself, or if it uses own GPUs.
    """
    found: list[Alternative] = []
    baseline: Baseline | None = None
    for trials in joint_trials(config, plan):
        for each in _shown(trials):
            if chosen is not None and chosen.change == each.change:
                continue  # the run itself
            found.append(_row(each.way, each.name, each.trial, each.size))
            if each.way == "joint_high_memory" and isinstance(each.trial, Trial) and each.trial.limit is None:
                baseline = _cheaper(baseline, each.trial)
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
    name = _THIS_RUN if chosen is None else f"{_THIS_RUN}: {chosen.name}"
    itself = way in WHOLE or is_joint_training({"seed": config.tokens.seed, "submodels": config.tokens.submodels})
    gap = 0.0 if itself else known.get(way)
    found.append(_row("run", name, run, run.workers).model_copy(update={"gap": gap}))
    return tuple(found), None if itself or config.has_own_cards else baseline


GROWN: Change = {"tokens": {"seed_share": 0.5, "finetune_share": 0.5}, "evaluation": {"ensemble": False}}
GROWN_NAME = "growing to all experts in the middle"


def _without_submodels(config: RunConfig) -> Change:
    seed_share = round(1 - config.tokens.finetune_share, 12)
    return {"tokens": {"seed_share": seed_share}, "evaluation": {"ensemble": False}}


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


def verdict(ways: Sequence[Alternative], quality: str, *, keeps_submodels: bool = False) -> str | None:
    """Which way costs least on these machines, in words; if the run costs no dollars, which of such ways is fastest.

    Ways that end at a higher loss than the run or at an unknown one, that train another model, or that round to fit
    though `recipe: auto` would not take them, are not compared with it. If one of them is much cheaper, a sentence says
    so.

    Args:
        ways: All ways, the run itself last.
        quality: What is known of the quality of the run's model.
        keeps_submodels: Whether `recipe: auto` would train sub-models whatever they cost.

    Returns:
        One sentence, and a second one on quality where the run is the cheapest; None if the run's time or cost is not
        known.
    """
    words, run = _compared(ways, quality, keeps_submodels=keeps_submodels), ways[-1]
    if words is None or run.limit is not None or not run.rounded:
        return words
    return f"{words} The run fits with {_rounding(run)}; what that costs in loss is not known."


def _compared(ways: Sequence[Alternative], quality: str, *, keeps_submodels: bool) -> str | None:
    run = ways[-1]
    fitting = [each for each in ways if each.dollars is not None and each.seconds is not None]
    priced = without_needless_rounding([each for each in fitting if not _is_worse(each, run)])
    if run.limit is not None:
        return _without_the_run(run.limit, priced, ways)
    if run.dollars is None or run.seconds is None:
        return None
    free = not run.dollars
    comparable = [each for each in priced if not free or not each.dollars]
    best = min(comparable, key=lambda each: _rank(each, free=free))
    if _is_chosen(run) and _costs_the_same(best, run, free=free):
        hardly = f"{best.name} costs hardly less, {_figures(best)}{_with_rounding(best)}"
        return f"On these machines this run takes {_figures(run)}: {hardly}."
    is_less = _rank(best, free=free)[0] < _rank(run, free=free)[0]
    if is_less or run not in comparable:
        better = f"is {'faster' if free else 'cheaper'}{_why(best)}{_with_rounding(best)}"
        if not is_less:
            better = f"rounds nothing and {'takes' if free else 'costs'} little more"
        is_auto = run.name == _THIS_RUN and best.way in WHOLE and not keeps_submodels
        return (
            f"On these machines {best.name} {better}: {_figures(best)}, against {_figures(run)} for this run."
            f"{' `recipe: auto` takes such a way.' if is_auto else ''}"
        )
    known = "" if _is_joint(run) else f" {quality}"
    worse = [each for each in fitting if each not in priced and (not free or not each.dollars)]
    cheap = min(worse, key=lambda each: _rank(each, free=free), default=None)
    is_much = cheap is not None and _rank(cheap, free=free)[0] < _MUCH_CHEAPER * _rank(run, free=free)[0]
    if cheap is not None and is_much:
        known += f" {cheap.name[0].upper()}{cheap.name[1:]} takes {_figures(cheap)}"
        known += f"{_higher(cheap, run)}{'' if run.rounded else _with_rounding(cheap)}."
    others = [each for each in comparable if each is not run] or [each for each in priced if each is not run]
    if not others:
        alone = "no other way reaches this run's loss: it takes" if worse else "nothing else fits: this run takes"
        return f"On these machines {alone} {_figures(run)}.{known}"
    other = min(others, key=lambda each: _rank(each, free=free))
    scope = " of the ways that reach its loss" if is_much else ""
    least = f"{'takes least time' if free else 'costs least'}{scope}: {_figures(run)}"
    if other.dollars and free:
        least = f"is the only one on own cards{scope}: {_figures(run)}"
    return f"On these machines this run {least}, against {_figures(other)} for {other.name}{_lower(other, run)}.{known}"


def _higher(way: Alternative, run: Alternative) -> str:
    if way.way == "members":
        return ", and how much higher its loss ends is not known"
    if way.gap is None or run.gap is None or way.gap <= run.gap:
        return ""
    return f", and ends at a loss that is {way.gap - run.gap:.2f} higher"


def _lower(way: Alternative, run: Alternative) -> str:
    """How much lower the loss of a way ends than the run's, in words; nothing if that is not known, or not so."""
    if way.gap is None or run.gap is None or way.gap >= run.gap:
        return ""
    return f", which ends at a loss that is {run.gap - way.gap:.2f} lower"


def _is_chosen(run: Alternative) -> bool:
    return run.name != _THIS_RUN


def _costs_the_same(best: Alternative, run: Alternative, *, free: bool) -> bool:
    """Whether a way costs a little less than the run, and takes longer."""
    least, dollars = _rank(best, free=free)[0], _rank(run, free=free)[0]
    return not free and least < dollars <= SAME_COST * least and (best.seconds or 0.0) > (run.seconds or 0.0)


def _is_joint(run: Alternative) -> bool:
    return run.name.startswith(f"{_THIS_RUN}: joint")


def _is_worse(way: Alternative, run: Alternative) -> bool:
    """Whether a way gives up loss that the run does not, or may do so, or trains another model."""
    return way is not run and (
        way.way in NOT_COMPARED or (None not in (way.gap, run.gap) and (way.gap or 0.0) > (run.gap or 0.0))
    )


def without_needless_rounding(ways: Sequence[Alternative]) -> list[Alternative]:
    """The ways that fit, without those that round where the rule of `recipe: auto` takes one that rounds nothing.

    It weighs them against joint training and the run itself, as a recipe does.
    """
    fitting = [each for each in ways if each.dollars is not None and each.seconds is not None]
    weighed = [each for each in fitting if each.way != "members" and (each.rounded or each.way in (*WHOLE, "run"))]
    kept = exact_first(weighed)
    return [each for each in fitting if each in kept or each not in weighed]


def _with_rounding(way: Alternative) -> str:
    return f", with {_rounding(way)}" if way.rounded else ""


def _rounding(way: Alternative) -> str:
    return " and ".join(_ROUNDED[each] for each in way.rounded)


def _why(best: Alternative) -> str:
    if best.name.endswith(WORKER):
        return ""
    if best.way == "joint_low_memory" and best.workers == 1:
        return ", because one cheap card trains the whole model"
    if best.way == "joint_high_memory":
        return ", so rent the large cards alone"
    return ""


def _without_the_run(limit: str, others: Sequence[Alternative], ways: Sequence[Alternative]) -> str:
    if not others:
        streamed = [f"; {each.name}: {each.limit}" for each in ways if each.way == "streamed"]
        return f"This run does not fit these machines ({limit}), nor does any other way{''.join(streamed)}."
    best = min(others, key=lambda each: _rank(each, free=all(not other.dollars for other in others)))
    return f"This run does not fit these machines ({limit}); {best.name} does{_with_rounding(best)}: {_figures(best)}."


def _rank(way: Alternative, *, free: bool) -> tuple[float, float]:
    dollars, seconds = way.dollars or 0.0, way.seconds or 0.0
    return (seconds, dollars) if free else (dollars, seconds)


def _figures(way: Alternative) -> str:
    """Dollars and time of a way; where no card costs anything, time and energy."""
    if way.dollars:
        return f"{format_dollars(way.dollars)} in {format_seconds(way.seconds)}"
    return " and ".join([format_seconds(way.seconds), *format_energy(way.kilowatt_hours)])


def format_energy(kilowatt_hours: float | None) -> tuple[str, ...]:
    """Energy in words; nothing if it is unknown."""
    return () if kilowatt_hours is None else (f"{kilowatt_hours:,.{1 if kilowatt_hours < 10 else 0}f} kWh",)


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


def _cheaper(now: Baseline | None, trial: Trial) -> Baseline | None:
    """The cheaper one of a baseline and a joint training."""
    dollars = trial.bill.dollars
    if dollars is None or trial.seconds is None or (now is not None and now.dollars <= dollars):
        return now
    return Baseline(lines=trial.bill.lines, dollars=dollars, rate="planned", seconds=trial.seconds)
