"""What a run costs, by one definition for the plan before a run and the meter during and after it.

A bill's total is the cost of every stage at the price of the slots that it holds, including start-ups and lost work.
Workers pay the price at which they took their slots (`prices`), whatever the configuration or the operator says later.
Slots without a worker cost money too if they are rented for this run alone. They have lines of their own, and only the
second total, `dollars_with_idle`, includes them.

The baseline is joint training: the same model, trained as a whole on the same number of tokens on the high-memory pool.
In a plan it is planned as a run of its own, with the number of the pool's workers that costs least. After a run, its
worker-seconds per token are those that the fine-tune measured, scaled by the pools' speed if the fine-tune ran on the
low-memory pool. Added to that are one start-up per worker at the pool's minimum size, and the evaluation and export of
the finished model. That baseline has no seed, sub-models, clusters or merge.

Saving = 1 - total / baseline; a saving below 0 means that the run costs more. A run that is itself joint training, or
not complete, has no saving. Nor has one on GPUs that cost nothing per hour: own cards cost time and energy, which no
share of rented cards' dollars measures.

The plan, `report.json`, the REST API, the tables, the web page, the model card and the trackers all read this one
structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel

from moedisco_ray.core.config import Evaluation, RunConfig
from moedisco_ray.core.records.metering import Meter, Usage, Work
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
    """A stage of the pipeline, `start-up` (only in a baseline), or `idle` for slots without a worker."""
    pool: str
    """`low_memory` or `high_memory`; a node type of a mixed pool is `low_memory.NAME`."""
    worker_seconds: float | None
    """Number of slots times seconds; null if a plan does not know the machines' speed."""
    dollars: float | None
    """Cost at the prices at which the slots were taken, or are planned; null if the seconds are unknown."""


class Baseline(BaseModel, frozen=True, defer_build=True):
    """Estimated cost of joint training: the whole model, on the same number of tokens, on the high-memory pool."""

    lines: tuple[Line, ...]
    dollars: float
    seconds: float
    """Wall-clock seconds, with the workers of the plan that costs least, or after a run with the pool's minimum."""
    rate: Literal["measured", "planned"]
    """Whether the worker-seconds per token were measured or planned. The baseline is an estimate in both cases."""


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
    """What the saving is measured against; null if the run itself is joint training or uses own GPUs, and as long as
    the fine-tune's speed is unknown."""
    saving: float | None
    """1 - `dollars` / the baseline's dollars; a value below 0 means that the run costs more. Never show it without
    `verdict`. Null unless the bill is complete and has a baseline."""
    quality: str
    """What is known of the model's quality at this cost."""
    verdict: str | None
    """A sentence with the saving, a note that the baseline is an estimate, and what is known of quality; in a plan, the
    plan's verdict. Null without a saving."""


def make_bill(
    lines: Iterable[Line],
    *,
    idle: Iterable[Line] = (),
    seconds: float | None,
    baseline: Baseline | None,
    quality: str | None = None,
    verdict: str | None = None,
    planned: bool,
    complete: bool,
) -> Bill:
    """Add up a bill.

    Args:
        lines: Lines of the run's work.
        idle: Lines of the slots that existed without a worker.
        seconds: Wall-clock seconds of the run; None if unknown.
        baseline: Joint training on the same number of tokens; None if there is nothing to compare with.
        quality: What is known of the model's quality at this cost; None stands for `QUALITY_UNKNOWN`.
        verdict: The bill's verdict if it has a saving; None: the saving in words.
        planned: Whether the bill belongs to a plan.
        complete: Whether the lines include all stages.
    """
    kept = _sorted(lines)
    unused = tuple(idle)
    total, spare = sum_dollars(kept), sum_dollars(unused) or 0.0
    saving = (
        1 - total / baseline.dollars if complete and total is not None and baseline and baseline.dollars > 0 else None
    )
    known = quality or QUALITY_UNKNOWN
    return Bill(
        planned=planned,
        complete=complete,
        lines=kept,
        dollars=total,
        idle=unused,
        idle_dollars=spare,
        dollars_with_idle=None if total is None else total + spare,
        seconds=seconds,
        baseline=baseline,
        saving=saving,
        quality=known,
        verdict=None if saving is None or baseline is None else verdict or f"{_in_words(saving, baseline)}. {known}",
    )


def metered_bill(meter: Meter, config: RunConfig, quality: str | None = None) -> Bill:
    """The bill of a run so far.

    Args:
        meter: Usage from the run's events.
        config: The run's configuration: pools with prices and speeds.
        quality: What is known of the model's quality at this cost; None if nothing is known.
    """
    book = PriceBook(config.pools)
    idle = [_charged("idle", pool, used, book) for pool, used in meter.idle_charges.items() if used.seconds]
    return make_bill(
        metered_lines(meter, book),
        idle=idle,
        seconds=meter.wall_seconds,
        baseline=_measured_baseline(meter, config),
        quality=quality,
        planned=False,
        complete=meter.finished,
    )


def metered_lines(meter: Meter, book: PriceBook) -> tuple[Line, ...]:
    """Usage and charges of a run so far, one line per stage and pool, in pipeline order.

    Args:
        meter: Usage from the run's events.
        book: Prices for usage whose events state none.
    """
    return _sorted(
        _charged(stage, pool, used, book) for stage, pools in meter.charges.items() for pool, used in pools.items()
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


def _sorted(lines: Iterable[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: (_ORDER.get(line.stage, len(_ORDER)), line.pool)))


def _charged(stage: str, pool: str, used: Usage, book: PriceBook) -> Line:
    """A line of metered usage: what was charged, and the book's price for time whose events state none."""
    dollars = used.dollars + dollars_of(used.unpriced, book.at(pool))
    return Line(stage=stage, pool=pool, worker_seconds=used.seconds, dollars=dollars)


def make_baseline(
    config: RunConfig, *, tokens: int, seconds_per_token: float, start_up: float, evaluate: float, export: float
) -> Baseline:
    """Estimate time and cost of joint training on the high-memory pool, from those measured in the run's fine-tune.

    Args:
        config: The run's configuration.
        tokens: Tokens that the run trains on, over all stages.
        seconds_per_token: Worker-seconds per token of the fine-tune.
        start_up: Seconds that one fine-tune worker takes from its start to its first step.
        evaluate: Worker-seconds to evaluate the finished model.
        export: Worker-seconds to export the finished model.
    """
    high = config.pools.high_memory
    experts = config.model.architecture.num_experts
    scale = config.finetune_pool.flops(experts) / high.flops(experts)
    training = tokens * seconds_per_token * scale
    lines = (
        line("start-up", high.key, start_up * high.fewest_workers, config),
        line("finetune", high.key, training, config),
        line("evaluate", high.key, evaluate * scale, config),
        line("export", high.key, export * scale, config),
    )
    return Baseline(
        lines=lines,
        dollars=sum_dollars(lines) or 0.0,
        rate="measured",
        seconds=start_up + training / high.fewest_workers + (evaluate + export) * scale,
    )


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


def _measured_baseline(meter: Meter, config: RunConfig) -> Baseline | None:
    tokens = {stage.name: meter.work[stage.name].tokens for stage in TRAINING if stage.name in meter.work}
    whole = meter.work.get("finetune", Work())
    if not whole.tokens or not whole.loop_seconds or is_joint_training(tokens) or config.has_own_cards:
        return None
    evaluated, exported = meter.work.get("evaluate", Work()), meter.work.get("export", Work())
    return make_baseline(
        config,
        tokens=sum(tokens.values()),
        seconds_per_token=whole.loop_seconds / whole.tokens * _with_measurements(config.evaluation),
        start_up=meter.start_up.get("finetune", 0.0),
        evaluate=max(0.0, evaluated.held_seconds - evaluated.extra_seconds),
        export=exported.held_seconds,
    )


def _with_measurements(evaluation: Evaluation) -> float:
    """Factor by which measuring the held-out loss lengthens a training; reading a token takes 1/3 of training it."""
    return 1.0 if evaluation.every_tokens is None else 1 + evaluation.slice_tokens / (3 * evaluation.every_tokens)


def _in_words(saving: float, baseline: Baseline) -> str:
    change = f"{100 * saving:.0f} % cheaper than" if saving >= 0 else f"Costs {-100 * saving:.0f} % more than"
    return (
        f"{change} joint training on as many tokens on the high-memory pool, {format_dollars(baseline.dollars)}, "
        f"an estimate from the fine-tune's {baseline.rate} speed"
    )


def sum_dollars(lines: Sequence[Line]) -> float | None:
    """The sum of the lines' dollars; None if one of them is unknown."""
    total = 0.0
    for each in lines:
        if each.dollars is None:
            return None
        total += each.dollars
    return total
