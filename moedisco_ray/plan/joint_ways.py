"""Joint training of the whole model on the cards of each pool, resident or streamed, each tried by a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moedisco_ray.core.config import HighMemoryPool, LowMemoryPool, Pool, Residence, RunConfig
from moedisco_ray.core.config.starts import changed
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.limits import USABLE_MEMORY, WORKER_PROCESS_GB
from moedisco_ray.core.records.bill import Bill
from moedisco_ray.core.records.ways import WORKER, Way
from moedisco_ray.plan.estimate import no_bill
from moedisco_ray.policies.gang import counts

_MOST_SIZES = 6
"""Most numbers of workers that are planned per pool."""
_JOINT_TOKENS = {"seed_share": 0, "finetune_share": 1}


@dataclasses.dataclass(frozen=True)
class Trial:
    """The plan of one way, as far as the comparison needs it.

    Attributes:
        memory_gb: Memory of the largest worker (GiB).
        workers: Largest number of workers at the same time.
        limit: Why it does not fit; None if it fits.
        seconds: Wall-clock time, without stages of the head whose time is unknown (s); None if that of workers is.
        kilowatt_hours: Energy of the cards (kWh); None if unknown.
        host_gb: Main memory that a worker fills with weights and optimizer state (GiB).
        rounded: What the plan rounds or divides to make it fit; see `core.records.ways.Alternative`.
        bill: Its bill.
    """

    memory_gb: float
    workers: int
    limit: str | None
    seconds: float | None
    kilowatt_hours: float | None
    host_gb: float
    rounded: tuple[str, ...]
    bill: Bill


Planner = Callable[[RunConfig], Trial]

Change = Mapping[str, Mapping[str, Any]]
"""Settings by section."""


@dataclasses.dataclass(frozen=True)
class Joint:
    """Training of the whole model in one phase on some cards.

    Attributes:
        way: The way.
        size: Number of workers.
        nodes: Number of machines that they need.
        name: The way in words.
        change: The settings that make a run of it.
        trial: Its plan; a text if the configuration does not allow it.
    """

    way: Way
    size: int
    nodes: int
    name: str
    change: Change
    trial: Trial | str

    @property
    def pool(self) -> str:
        """Name of the pool on whose cards the model trains."""
        return str(self.change["finetune"]["pool"])

    @property
    def fits(self) -> bool:
        return isinstance(self.trial, Trial) and self.trial.limit is None

    @property
    def limit(self) -> str | None:
        """Why it is impossible; None if it is not."""
        return self.trial if isinstance(self.trial, str) else self.trial.limit

    @property
    def rounded(self) -> tuple[str, ...]:
        """What its plan rounds or divides to make it fit."""
        return () if isinstance(self.trial, str) else self.trial.rounded

    @property
    def cost(self) -> tuple[float, float]:
        """Dollars and seconds; unknown ones count as most, so that the order of the ways decides."""
        return cost_of_trial(self.trial)


def cost_of_trial(trial: Trial | str) -> tuple[float, float]:
    """Dollars and seconds; infinite where they are not known."""
    if isinstance(trial, str):
        return math.inf, math.inf
    dollars, seconds = trial.bill.dollars, trial.seconds
    return math.inf if dollars is None else dollars, math.inf if seconds is None else seconds


def joint_trials(config: RunConfig, plan: Planner) -> Iterator[list[Joint]]:
    """Joint training on each kind of cards, by ascending number of workers.

    Where one card does not hold the whole model, one card with the weights in the main memory follows, and all cards of
    one machine: over a slow network they take less time than several cards that hold it together.
    """
    for cards in joint_ways(config):
        if cards.pool.memory == "streamed":  # as the configuration asks
            yield _streamed_trials(config, plan, cards)
            continue
        found = [
            Joint(
                cards.way,
                size=size,
                nodes=-(-size // cards.pool.gpus_per_node),
                name=f"joint training on {size} x {cards.name}",
                change=cards.change(size),
                trial=tried(config, plan, cards.change(size)),
            )
            for size in cards.sizes
        ]
        yield found
        if cards.pool.gpu and not found[0].fits:
            yield _streamed_trials(config, plan, cards)


def _streamed_trials(config: RunConfig, plan: Planner, cards: Cards) -> list[Joint]:
    """Streamed training on one card, and on all of one machine, which need as much memory each."""
    found = [_streamed(config, plan, cards, 1)]
    together = min(cards.pool.gpus_per_node, cards.sizes[-1])
    return [*found, _streamed(config, plan, cards, together)] if together > 1 and found[0].fits else found


def _streamed(config: RunConfig, plan: Planner, cards: Cards, size: int) -> Joint:
    change = cards.change(size, "streamed")
    trial = tried(config, plan, change)
    trial = on_known_machine(config, plan, change, trial, cards.pool)
    name = f"joint training on {size} x {cards.name}, streamed from main memory"
    return Joint("streamed", size=size, nodes=1, name=name, change=change, trial=trial)


def on_known_machine(
    config: RunConfig, plan: Planner, change: Change, trial: Trial | str, pool: Pool, *, section: str = "finetune"
) -> Trial | str:
    """The plan of streamed training, which is impossible where neither the pool asks for it nor says its main memory.

    Args:
        config: The configuration.
        plan: Function that plans another configuration.
        change: The settings that make a run of it.
        trial: Its plan; a text if the configuration does not allow it.
        pool: The pool, as the configuration has it.
        section: Section with the settings of the training.
    """
    is_asked_for = pool.memory == "streamed" or pool.host_memory_gb is not None
    if is_asked_for or isinstance(trial, str) or trial.limit is not None:
        return trial
    needed = _host_gb(config, plan, change, trial, section)
    limit = f"needs a machine with {needed}; set {pool.path}.host_memory_gb"
    return dataclasses.replace(trial, limit=limit, seconds=None, kilowatt_hours=None, bill=no_bill())


def _host_gb(config: RunConfig, plan: Planner, change: Change, trial: Trial, section: str) -> str:
    """Main memory of a machine that streams the weights, and with weights in bf16 if a plan may choose them."""

    def machine_gb(each: Trial) -> int:
        return math.ceil((each.host_gb + WORKER_PROCESS_GB) / USABLE_MEMORY)

    needed = f"{machine_gb(trial)} GiB of main memory"
    settings = getattr(config, section).model_dump() | change[section]
    if settings["optimizer"]["precision"] == "auto":
        optimizer = settings["optimizer"] | {"precision": "pure_bf16"}
        least = tried(config, plan, {**change, section: {**change[section], "optimizer": optimizer}})
        if isinstance(least, Trial) and least.limit is None and least.host_gb < trial.host_gb:
            return f"{needed}, or {machine_gb(least)} GiB with weights in bf16"
    return needed


@dataclasses.dataclass(frozen=True)
class Cards:
    """Cards of one kind on which the whole model could train.

    Attributes:
        way: The way, with the weights on the cards.
        name: Name of the card.
        pool: The pool.
        sizes: Numbers of workers to plan, ascending from 1.
    """

    way: Way
    name: str
    pool: LowMemoryPool | HighMemoryPool
    sizes: tuple[int, ...]

    def change(self, workers: int, memory: Residence = "resident") -> Change:
        """The settings that make a run of it."""
        pool, settings = self.pool.name, self.pool.model_dump(exclude={"type_name"}) | {"memory": memory}
        if isinstance(self.pool, LowMemoryPool):
            settings |= {"types": (), "seed_workers": "auto", "max_workers": workers}
        else:
            settings["workers"] = workers
        return {
            "tokens": _JOINT_TOKENS,
            "finetune": {"pool": pool},
            "export": {"keep_apart": "auto"},
            "pools": {pool: settings},
        }


def joint_ways(config: RunConfig) -> Iterator[Cards]:
    """The cards on which the whole model could train."""
    low, high = config.pools.low_memory, config.pools.high_memory
    sequences = config.finetune.optimizer.batch_tokens // config.corpus.sequence_length
    if high.gpu or not low.gpu:  # else there are no large cards
        yield Cards("joint_high_memory", card_name(high, "high-memory"), high, _sizes(sequences, high.most_workers))
    for kind in usual_types(low):
        same = kind.card is not None and (kind.card, kind.price_per_hour) == (high.card, high.price_per_hour)
        if high.gpu and same and min(kind.max_workers, low.max_workers) <= high.most_workers:
            continue  # the same machines
        sizes = _sizes(sequences, min(kind.max_workers, low.max_workers))
        yield Cards("joint_low_memory", card_name(kind, "low-memory"), kind, sizes)


def usual_types(pool: LowMemoryPool) -> tuple[LowMemoryPool, ...]:
    """The node types on which joint training is planned: of several, the cheapest for its speed, and the largest."""
    types = pool.node_types
    cheapest = min(types, key=lambda each: each.price_per_hour / each.speed)
    largest = max(types, key=lambda each: each.memory_gb)
    return (cheapest,) if largest.memory_gb == cheapest.memory_gb else (cheapest, largest)


def _sizes(sequences: int, most: int) -> tuple[int, ...]:
    """Numbers of workers to plan: all that divide the batch, or some of them where there are many."""
    allowed = counts(sequences, 1, most)
    return tuple(dict.fromkeys(allowed[round(k * (len(allowed) - 1) / (_MOST_SIZES - 1))] for k in range(_MOST_SIZES)))


def card_name(pool: Pool, otherwise: str = "low-memory") -> str:
    """Name of a pool's cards, or of what computes there."""
    return pool.card or f"{otherwise} {'card' if pool.gpu else WORKER}"


def tried(config: RunConfig, plan: Planner, change: Change) -> Trial | str:
    """The plan of the configuration with other settings; a text if the configuration does not allow them."""
    try:
        return plan(changed(config, change))
    except UserError as error:
        return str(error)
