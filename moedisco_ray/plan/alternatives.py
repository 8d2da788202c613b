"""Other ways to train a run's model on the same tokens and machines, each planned as a run of its own.

All have the run's recipe, cards, prices and network: only the tokens of the phases, the pool of the fine-tune and the
number of its workers differ. So a plan can say which way is cheapest on these machines, also if that is another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from moedisco_ray.core.config import LowMemoryPool, Pool, RunConfig
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.records.bill import Baseline, Bill, format_dollars, format_seconds, is_joint_training
from moedisco_ray.policies.gang import counts

Way = Literal["joint_high_memory", "joint_low_memory", "without_submodels", "run"]

_MOST_SIZES = 6
"""Most numbers of workers that are planned per pool."""
_WORKER = "worker"
"""What computes in a pool without GPUs."""
_JOINT_TOKENS = {"seed_share": 0, "finetune_share": 1}


class Alternative(BaseModel, frozen=True):
    """A way to train the model on the run's tokens, and what it needs."""

    way: Way
    """`joint_high_memory` and `joint_low_memory` train the whole model in one phase on that pool, `without_submodels`
    gives the tokens of the sub-models to the phase before them, `run` is the configuration itself."""
    name: str
    """The way in words, with its cards."""
    workers: int
    """Largest number of workers at the same time."""
    seconds: float | None
    """Wall-clock time in seconds, without text processing if its time is unknown; null if the way does not fit, or if
    the speed of its workers is unknown."""
    dollars: float | None
    """Cost in dollars; null if it does not fit, or if it is unknown."""
    memory_gb: float | None
    """Memory of the largest worker (GiB), with the configured settings if no others that a plan may choose make it fit;
    null if the configuration does not allow the way."""
    limit: str | None
    """Why this way is impossible; null if it is not."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """The plan of one way, as far as the comparison needs it.

    Attributes:
        memory_gb: Memory of the largest worker (GiB).
        workers: Largest number of workers at the same time.
        limit: Why it does not fit; None if it fits.
        seconds: Wall-clock time, without stages of the head whose time is unknown (s); None if that of workers is.
        bill: Its bill.
    """

    memory_gb: float
    workers: int
    limit: str | None
    seconds: float | None
    bill: Bill


Planner = Callable[[RunConfig], Trial]


def alternatives(config: RunConfig, run: Trial, plan: Planner) -> tuple[tuple[Alternative, ...], Baseline | None]:
    """All ways to train the run's model, the run itself last.

    Args:
        config: The run's configuration, with a number of clusters.
        run: The plan of the run itself.
        plan: Function that plans another configuration.

    Returns:
        The ways, and the cheapest joint training on the high-memory pool as the baseline of the run's bill; None if
        none fits, or if the run is joint training itself.
    """
    found: list[Alternative] = []
    baseline: Baseline | None = None
    for way, name, sizes, change in _joint(config):
        tried = [_tried(config, plan, change(size)) for size in sizes]
        for size, trial in _shown(dict(zip(sizes, tried, strict=True))):
            found.append(_row(way, f"joint training on {size} x {name}", trial, size))
            if way == "joint_high_memory" and isinstance(trial, Trial) and trial.limit is None:
                baseline = _cheaper(baseline, trial)
    if config.tokens.decoupled and config.tokens.seed:
        seed = round(1 - config.tokens.finetune_share, 12)
        trial = _tried(config, plan, {"tokens": {"seed_share": seed}, "evaluation": {"ensemble": False}})
        found.append(_row("without_submodels", "without sub-models", trial, run.workers))
    found.append(_row("run", "this run", run, run.workers))
    itself = is_joint_training(config, {"seed": config.tokens.seed, "submodels": config.tokens.submodels})
    return tuple(found), None if itself else baseline


def _shown(tried: Mapping[int, Trial | str]) -> Iterator[tuple[int, Trial | str]]:
    """The fewest workers that fit, the number that costs least, and the most; the most alone if no number fits."""
    fitting = {size: trial for size, trial in tried.items() if isinstance(trial, Trial) and trial.limit is None}
    if not fitting:
        yield max(tried.items())
        return
    cheapest = min(fitting, key=lambda size: fitting[size].bill.dollars or 0.0)
    yield from ((size, fitting[size]) for size in sorted({min(fitting), cheapest, max(fitting)}))


def verdict(ways: Sequence[Alternative], quality: str) -> str | None:
    """Which way costs least on these machines, in words; where all are free, which takes the least time.

    Args:
        ways: All ways, the run itself last.
        quality: What is known of the quality of the run's model.

    Returns:
        One sentence, and a second one on quality where the run is the cheapest; None if the run's time or cost is not
        known.
    """
    run = ways[-1]
    priced = [each for each in ways if each.dollars is not None and each.seconds is not None]
    if run.limit is not None:
        return _without_the_run(run.limit, priced)
    if run.dollars is None or run.seconds is None:
        return None
    free = all(not each.dollars for each in priced)
    best = min(priced, key=lambda each: _rank(each, free=free))
    if _rank(best, free=free)[0] >= _rank(run, free=free)[0]:
        others = [each for each in priced if each is not run]
        if not others:
            return f"On these machines nothing else fits: this run takes {_figures(run)}. {quality}"
        other = min(others, key=lambda each: _rank(each, free=free))
        least = f"{'takes least time' if free else 'costs least'}: {_figures(run)}"
        return f"On these machines this run {least}, against {_figures(other)} for {other.name}. {quality}"
    return (
        f"On these machines {best.name} is {'faster' if free else 'cheaper'}{_why(best)}: {_figures(best)}, against "
        f"{_figures(run)} for this run."
    )


def _why(best: Alternative) -> str:
    if best.name.endswith(_WORKER):
        return ""
    if best.way == "joint_low_memory" and best.workers == 1:
        return ", because one cheap card trains the whole model"
    if best.way == "joint_high_memory":
        return ", so rent the large cards alone"
    return ""


def _without_the_run(limit: str, others: Sequence[Alternative]) -> str:
    if not others:
        return f"This run does not fit these machines ({limit}), nor does any other way."
    best = min(others, key=lambda each: _rank(each, free=all(not other.dollars for other in others)))
    return f"This run does not fit these machines ({limit}); {best.name} does: {_figures(best)}."


def _rank(way: Alternative, *, free: bool) -> tuple[float, float]:
    dollars, seconds = way.dollars or 0.0, way.seconds or 0.0
    return (seconds, dollars) if free else (dollars, seconds)


def _figures(way: Alternative) -> str:
    return f"{format_dollars(way.dollars)} in {format_seconds(way.seconds)}"


Change = Mapping[str, Mapping[str, Any]]


def _joint(config: RunConfig) -> Iterator[tuple[Way, str, tuple[int, ...], Callable[[int], Change]]]:
    """The pools on which the whole model could train: way, name of the card, numbers of workers, and settings."""
    low, high = config.pools.low_memory, config.pools.high_memory
    sequences = config.finetune.optimizer.batch_tokens // config.corpus.sequence_length

    def on_high(workers: int) -> Change:
        return _changes("high_memory", {"high_memory": high.model_dump() | {"workers": workers}})

    if high.gpu or not low.gpu:  # else there are no large cards
        yield "joint_high_memory", _card(high, "high-memory"), _sizes(sequences, high.most_workers), on_high
    for kind in _usual_types(low):
        same = kind.card is not None and (kind.card, kind.price_per_hour) == (high.card, high.price_per_hour)
        if high.gpu and same and min(kind.max_workers, low.max_workers) <= high.most_workers:
            continue  # the same machines
        own = kind.model_dump(exclude={"type_name"}) | {"types": (), "seed_workers": "auto"}

        def on_low(workers: int, own: Mapping[str, Any] = own) -> Change:
            return _changes("low_memory", {"low_memory": {**own, "max_workers": workers}})

        yield (
            "joint_low_memory",
            _card(kind, "low-memory"),
            _sizes(sequences, min(kind.max_workers, low.max_workers)),
            on_low,
        )


def _usual_types(pool: LowMemoryPool) -> tuple[LowMemoryPool, ...]:
    """The node types on which joint training is planned: of several, the cheapest for its speed, and the largest."""
    types = pool.node_types
    cheapest = min(types, key=lambda each: each.price_per_hour / each.speed)
    largest = max(types, key=lambda each: each.memory_gb)
    return (cheapest,) if largest.memory_gb == cheapest.memory_gb else (cheapest, largest)


def _sizes(sequences: int, most: int) -> tuple[int, ...]:
    """Numbers of workers to plan: all that divide the batch, or some of them where there are many."""
    allowed = counts(sequences, 1, most)
    return tuple(dict.fromkeys(allowed[round(k * (len(allowed) - 1) / (_MOST_SIZES - 1))] for k in range(_MOST_SIZES)))


def _card(pool: Pool, otherwise: str) -> str:
    return pool.card or f"{otherwise} {'card' if pool.gpu else _WORKER}"


def _changes(pool: str, pools: Mapping[str, Any]) -> Change:
    return {"tokens": _JOINT_TOKENS, "finetune": {"pool": pool}, "evaluation": {"ensemble": False}, "pools": pools}


def _tried(config: RunConfig, plan: Planner, change: Change) -> Trial | str:
    """The plan of the configuration with other settings; a text if the configuration does not allow them."""
    raw = config.model_dump()
    try:
        return plan(
            RunConfig.model_validate(raw | {section: raw[section] | dict(values) for section, values in change.items()})
        )
    except ValidationError as error:
        return str(first_mistake(error.errors()))
    except UserError as error:
        return str(error)


def _row(way: Way, name: str, trial: Trial | str, workers: int) -> Alternative:
    if isinstance(trial, str):
        return Alternative(way=way, name=name, workers=workers, seconds=None, dollars=None, memory_gb=None, limit=trial)
    return Alternative(
        way=way,
        name=name,
        workers=trial.workers,
        seconds=trial.seconds,
        dollars=trial.bill.dollars,
        memory_gb=trial.memory_gb,
        limit=trial.limit,
    )


def _cheaper(now: Baseline | None, trial: Trial) -> Baseline | None:
    """The cheaper one of a baseline and a joint training."""
    dollars = trial.bill.dollars
    if dollars is None or trial.seconds is None or (now is not None and now.dollars <= dollars):
        return now
    return Baseline(lines=trial.bill.lines, dollars=dollars, rate="planned", seconds=trial.seconds)
