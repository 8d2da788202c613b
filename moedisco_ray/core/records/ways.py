"""Ways to train a run's model, as a plan compares them, and which of them costs least on the run's machines, in words.

A plan writes the rows. A run's first event records them, so that a finished run is compared with the same ways: their
dollars and seconds are the plan's, times what the run took against its own row, since both err alike about a machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from moedisco_ray.core.records.bill import QUALITY_UNKNOWN, Baseline, Bill, format_dollars, format_seconds

_MOST_WAYS = 32
"""Number of ways that are kept of an event, which comes from a driver."""
Way = Literal[
    "joint_high_memory",
    "joint_low_memory",
    "streamed",
    "members",
    "grown",
    "half",
    "without_submodels",
    "submodels",
    "run",
]
WHOLE: tuple[Way, ...] = ("joint_high_memory", "joint_low_memory", "streamed")
"""Ways that train the whole model in one phase."""
NOT_COMPARED: tuple[Way, ...] = ("members", "half")
"""Ways that no verdict recommends: how much higher the loss ends is not known, or the model is another one."""
WORKER = "worker"
"""What computes in a pool without GPUs."""
EXACT_COST = 1.5
"""Largest cost or time of a way that rounds nothing, relative to one that must round to fit, at which it is taken. Of
weights in bf16, 1.4 times the time until the same loss is assumed (`plan.fitting`), which the hours leave out."""
THIS_RUN = "this run"
SAME_COST = 1.02
"""Ratio of two costs up to which the time decides."""
_ROUNDED = {"bf16": "weights in bf16", "fp8": "optimizer state in fp8", "blocks": "updates in blocks"}
"""What a way rounds or divides, in words."""
_ESTIMATES = "Figures of other ways are the plan's, times what this run took against its own."
_MUCH_CHEAPER = 0.9
"""Largest cost or time of a way with a higher loss, relative to the run's, from which on a verdict mentions it."""


class Alternative(BaseModel, frozen=True, defer_build=True, allow_inf_nan=False):
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


class Costed(Protocol):
    """A way that may have to round to fit."""

    @property
    def rounded(self) -> tuple[str, ...]:
        """What it rounds or divides."""

    @property
    def cost(self) -> tuple[float, float]:
        """Dollars and seconds; infinite where they are not known."""


W = TypeVar("W", bound=Costed)


def exact_first(ways: Sequence[W]) -> Sequence[W]:
    """The ways that round nothing to fit, if the cheapest of them costs little more than the cheapest of all; or all.

    Cards that cost nothing are compared by time.
    """
    exact = [each for each in ways if not each.rounded]
    if not exact:
        return ways
    dollars, seconds = min(each.cost for each in exact)
    least, fastest = min(each.cost for each in ways)
    is_near = dollars <= EXACT_COST * least if least else not dollars and seconds <= EXACT_COST * fastest
    return exact if is_near else ways


_WAYS = TypeAdapter(tuple[Alternative, ...], config={"defer_build": True})


def with_ways(bill: Bill, ways: Sequence[Alternative], *, keeps_submodels: bool = True) -> Bill:
    """The bill with a baseline, a saving and a verdict: compared with the other ways to train the run's model.

    The baseline is the cheapest other way that fits and is not known to end at a higher loss. Ways in a metered bill
    cost what they are planned to cost, times what the run has cost against its plan.

    Args:
        bill: A planned or a metered bill.
        ways: All ways, the run itself last; empty if none were recorded.
        keeps_submodels: Whether `recipe: auto` would train sub-models whatever they cost.
    """
    if not ways or not bill.complete or bill.dollars is None or bill.seconds is None:
        return bill
    scaled = ways if bill.planned else _as_metered(bill, ways)
    run = scaled[-1]
    others = [each for each in comparable(scaled) if each is not run and each.dollars]
    if run.limit is not None or not run.dollars or not others:
        return bill  # own cards cost time and energy, which no share of rented cards' dollars measures
    cheapest = min(others, key=lambda each: each.cost)
    notes = () if bill.planned else (_ESTIMATES,)
    words = verdict(scaled, " ".join([*notes, bill.quality]), keeps_submodels=keeps_submodels)
    measured = () if bill.quality == QUALITY_UNKNOWN else (bill.quality,)
    for each in (*notes, *measured):
        if words is not None and each not in words:
            words = f"{words} {each}"
    baseline = Baseline(name=cheapest.name, dollars=cheapest.dollars or 0.0, seconds=cheapest.seconds or 0.0)
    return bill.model_copy(
        update={"baseline": baseline, "saving": 1 - run.dollars / baseline.dollars, "verdict": words}
    )


def _as_metered(bill: Bill, ways: Sequence[Alternative]) -> list[Alternative]:
    """The ways at the prices and the speed that a run has had: its own row is metered, the others are scaled alike."""
    planned = ways[-1]
    dollars = (bill.dollars or 0.0) / planned.dollars if planned.dollars else math.nan
    seconds = (bill.seconds or 0.0) / planned.seconds if planned.seconds else math.nan
    if not math.isfinite(dollars * seconds):
        return [planned.model_copy(update={"dollars": bill.dollars, "seconds": bill.seconds})]
    return [
        each
        if each.dollars is None or each.seconds is None
        else each.model_copy(update={"dollars": dollars * each.dollars, "seconds": seconds * each.seconds})
        for each in ways
    ]


def stored_ways(rows: object) -> tuple[Alternative, ...]:
    """The ways that an event lists; none if another version wrote them in another form, or if they make no sense."""
    try:
        return _WAYS.validate_python(rows or ())[-_MOST_WAYS:]
    except ValidationError:
        return ()


def comparable(ways: Sequence[Alternative]) -> list[Alternative]:
    """The ways that fit and do not end at a higher loss than the run, the last one, as far as that is known."""
    fitting = [each for each in ways if each.dollars is not None and each.seconds is not None]
    return without_needless_rounding([each for each in fitting if not _is_worse(each, ways[-1])])


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
    priced = comparable(ways)
    if run.limit is not None:
        return _without_the_run(run.limit, priced, ways)
    if run.dollars is None or run.seconds is None:
        return None
    free = not run.dollars
    alike = [each for each in priced if not free or not each.dollars]
    best = min(alike, key=lambda each: _rank(each, free=free))
    if _is_chosen(run) and _costs_the_same(best, run, free=free):
        hardly = f"{best.name} costs hardly less, {_figures(best)}{_with_rounding(best)}"
        return f"On these machines this run takes {_figures(run)}: {hardly}."
    is_less = _rank(best, free=free)[0] < _rank(run, free=free)[0]
    if is_less or run not in alike:
        better = f"is {'faster' if free else 'cheaper'}{_why(best)}{_with_rounding(best)}"
        if not is_less:
            better = f"rounds nothing and {'takes' if free else 'costs'} little more"
        is_auto = run.name == THIS_RUN and best.way in WHOLE and not keeps_submodels
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
    others = [each for each in alike if each is not run] or [each for each in priced if each is not run]
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
    return run.name != THIS_RUN


def _costs_the_same(best: Alternative, run: Alternative, *, free: bool) -> bool:
    """Whether a way costs a little less than the run, and takes longer."""
    least, dollars = _rank(best, free=free)[0], _rank(run, free=free)[0]
    return not free and least < dollars <= SAME_COST * least and (best.seconds or 0.0) > (run.seconds or 0.0)


def _is_joint(run: Alternative) -> bool:
    return run.name.startswith(f"{THIS_RUN}: joint")


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
