"""What a run costs, by one definition for the plan before a run and the meter during and after it.

A bill's total is the cost of every stage at the price of the slots that it holds, including start-ups and lost work.
Workers pay the price at which they took their slots (`prices`), whatever the configuration or the operator says later.
Slots without a worker cost money too if they are rented for this run alone. They have lines of their own, and only the
second total, `dollars_with_idle`, includes them.

The baseline is the cheapest other way to train the model on the run's machines that fits and is not known to end at a
higher loss (`records.ways`): a way that a plan works out as a run of its own.

Saving = 1 - total / baseline; a saving below 0 means that the run costs more. A run that is not complete has no saving.
Nor has one on GPUs that cost nothing per hour: own cards cost time and energy, which no share of rented cards' dollars
measures.

The plan, `report.json`, the REST API, the tables, the web page, the model card and the trackers all read this one
structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.prices import PriceBook, dollars_of
from moedisco_ray.core.stages import STAGES, TRAINING

QUALITY_UNKNOWN = (
    "The quality of joint training at this cost was not measured for this run; benchmarks/RESULTS.md has what is known."
)
"""What a bill says about the model's quality, unless a comparison has measured it."""

_ORDER = {stage.name: number for number, stage in enumerate(STAGES)}


class Line(BaseModel, frozen=True, defer_build=True):
    """Usage and cost of one stage on one pool."""

    stage: str
    """A stage of the pipeline, or `idle` for slots without a worker."""
    pool: str
    """`low_memory` or `high_memory`; a node type of a mixed pool is `low_memory.NAME`."""
    worker_seconds: float | None
    """Number of slots times seconds; null if a plan does not know the machines' speed."""
    dollars: float | None
    """Cost at the prices at which the slots were taken, or are planned; null if the seconds are unknown."""


class Baseline(BaseModel, frozen=True, defer_build=True):
    """The cheapest other way to train the model on these machines that is not known to end at a higher loss."""

    name: str = "joint training on the high-memory pool"
    """The way in words, with its cards. Reports of earlier versions have none: theirs was always the default."""
    dollars: float
    """Its cost, an estimate: planned, and after a run times what the run has cost against its plan."""
    seconds: float
    """Its wall-clock seconds, estimated likewise."""


class Bill(BaseModel, frozen=True, defer_build=True):
    """The cost of a run."""

    planned: bool
    """Whether the bill was planned before the run; otherwise it was metered during the run."""
    complete: bool
    """Whether the bill covers all of the run's work; the bill of a plan leaves out `evaluation.lm_eval`."""
    lines: tuple[Line, ...]
    """One line per stage and pool, in pipeline order."""
    dollars: float | None
    """Sum of the lines' dollars; null if one of them is unknown."""
    idle: tuple[Line, ...]
    """One line per pool for slots that existed without a worker."""
    idle_dollars: float
    """Sum of the idle lines' dollars."""
    dollars_with_idle: float | None
    """Sum of `dollars` and `idle_dollars`: the cost if the machines were rented for this run alone; null if `dollars`
    is null."""
    seconds: float | None
    """Wall-clock seconds of the run, over all attempts; null if a plan cannot estimate them."""
    baseline: Baseline | None
    """What the saving is measured against; null if no other way fits, if time or cost of the plan are unknown, and on
    own GPUs."""
    saving: float | None
    """1 - `dollars` / the baseline's dollars; a value below 0 means that the run costs more. Never show it without
    `verdict`. Null unless the bill is complete and has a baseline."""
    quality: str
    """What is known of the model's quality at this cost."""
    verdict: str | None
    """Which way costs least on these machines, and what is known of quality. Null without a saving."""


def make_bill(
    lines: Iterable[Line],
    *,
    idle: Iterable[Line] = (),
    seconds: float | None,
    quality: str | None = None,
    planned: bool,
    complete: bool,
) -> Bill:
    """Add up a bill; `ways.with_ways` compares it with other ways to train.

    Args:
        lines: Lines of the run's work.
        idle: Lines of the slots that existed without a worker.
        seconds: Wall-clock seconds of the run; None if unknown.
        quality: What is known of the model's quality at this cost; None stands for `QUALITY_UNKNOWN`.
        planned: Whether the bill belongs to a plan.
        complete: Whether the lines include all stages.
    """
    kept = in_order(lines)
    unused = tuple(idle)
    total, spare = sum_dollars(kept), sum_dollars(unused) or 0.0
    return Bill(
        planned=planned,
        complete=complete,
        lines=kept,
        dollars=total,
        idle=unused,
        idle_dollars=spare,
        dollars_with_idle=None if total is None else total + spare,
        seconds=seconds,
        baseline=None,
        saving=None,
        quality=quality or QUALITY_UNKNOWN,
        verdict=None,
    )


def line(stage: str, pool: str, worker_seconds: float | None, config: RunConfig) -> Line:
    """Make a line of a bill, at the pool's price in the configuration.

    Args:
        stage: Name of the line.
        pool: `Pool.key`.
        worker_seconds: Worker-seconds of the line; None if unknown.
        config: The run's configuration.
    """
    price = PriceBook(config.pools).at(pool)
    dollars = None if worker_seconds is None else dollars_of(worker_seconds, price)
    return Line(stage=stage, pool=pool, worker_seconds=worker_seconds, dollars=dollars)


def in_order(lines: Iterable[Line]) -> tuple[Line, ...]:
    """The lines in the order of the pipeline."""
    return tuple(sorted(lines, key=lambda line: (_ORDER.get(line.stage, len(_ORDER)), line.pool)))


def is_joint_training(tokens: Mapping[str, int]) -> bool:
    """Whether a run trains nothing but the whole model, on whichever pool.

    Args:
        tokens: Tokens of each training stage.
    """
    return not any(tokens.get(stage.name) for stage in TRAINING if not stage.trains_whole)


def idle_in_words(bill: Bill) -> str:
    """A bill's cost in words: `$0.0425, or $0.0510 with idle machines`, or only the first amount if none was idle."""
    total = format_dollars(bill.dollars)
    return (
        total if not bill.idle_dollars else f"{total}, or {format_dollars(bill.dollars_with_idle)} with idle machines"
    )


def format_seconds(seconds: float | None) -> str:
    """A duration in human-readable form: `8.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "unknown"
    if seconds < 59.95:  # else it would round to 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_dollars(dollars: float | None) -> str:
    """Format dollars with two decimals, or with four for amounts below one dollar."""
    if dollars is None:
        return "unknown"
    return f"${dollars:,.2f}" if dollars >= 1 or dollars == 0 else f"${dollars:.4f}"


def sum_dollars(lines: Sequence[Line]) -> float | None:
    """The sum of the lines' dollars; None if one of them is unknown."""
    total = 0.0
    for each in lines:
        if each.dollars is None:
            return None
        total += each.dollars
    return total
