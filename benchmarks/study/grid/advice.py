"""Advice on a configuration, from the measured pieces of the grid and within their range only.

The gap of an arm to joint training is interpolated over the log of the tokens, between the measured budgets. Dollars to
joint training's loss are those for the same tokens, at the configuration's prices, times exp(gap / slope of joint
training's loss). Numbers of experts are compared at the loss of the best one: each needs exp(difference / slope) times
the tokens, and is then served.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.compare.arms import REFERENCE, half_of_experts, planned
from benchmarks.study.grid.cells import Cell, Start
from benchmarks.study.grid.levers import KNOWN, WITH_ADAMW
from benchmarks.study.grid.pieces import HALF
from benchmarks.study.grid.records import Phase, PieceResult
from benchmarks.study.grid.section import ROWS
from benchmarks.study.grid.summary import JOINT_LOW, on_cheap_cards
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.pools import AnyPool
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.summaries import Record

SIZE_FACTOR = 2.0
"""Largest ratio of a model's operations per token to those of the measured models."""
_OF_THE_SIZE = ("clusters.count", "merge.calibration_tokens", "submodels.optimizer.lr", "finetune.optimizer.lr")
"""Settings that suit the measured models and their text, which are no advice for others."""


class Option(Record):
    """An arm as an option for a configuration."""

    arm: str
    title: str
    gap: float
    """Loss at equal tokens minus joint training's (nats per token)."""
    dollars: float
    """Dollars until joint training's loss; joint training on the high-memory pool is 1."""
    settings: dict[str, Any]
    """The arm's measured settings by dotted path, with its number of sub-models, without learning rates."""
    tuned: bool
    """Whether a sweep chose its learning rate, schedule and batch size."""


class ShapeOption(Record):
    """A number of experts and a top-k as an option."""

    experts: int
    top_k: int
    arm: str
    """Cheapest arm."""
    dollars: float
    """Dollars of training to the loss of the best shape, and of serving; joint training of the configured model is
    1."""


class Advice(Record):
    """Options for a configuration, the cheapest first."""

    options: tuple[Option, ...]
    shapes: tuple[ShapeOption, ...]
    """Shapes that are measured at these tokens; one of them alone is no advice."""
    seeds: int
    """Smallest number of seeds behind a figure."""


class _Measured:
    """The pieces of one cell at all of its budgets."""

    def __init__(self, pieces: Sequence[PieceResult]) -> None:
        self.cell: Cell = pieces[0].cell
        self.pieces = len(pieces)
        self._by_arm: dict[str, dict[int, dict[int, PieceResult]]] = {}
        for each in (*pieces, *(on_cheap_cards(each) for each in pieces if each.arm == REFERENCE)):
            self._by_arm.setdefault(each.arm, {}).setdefault(each.cell.tokens, {})[each.seed] = each

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self._by_arm)

    @property
    def flops_per_token(self) -> float:
        tokens, joint = next(iter(self._by_arm[REFERENCE].items()))
        return max(phase.flops for phase in next(iter(joint.values())).phases) / tokens

    def budgets(self, arm: str = REFERENCE) -> list[int]:
        """Budgets of an arm with a seed that joint training and all of the arm's budgets share, in tokens."""
        return sorted(self._by_arm[arm]) if self.seeds(arm) else []

    def seeds(self, arm: str = REFERENCE) -> set[int]:
        joint = self._by_arm[REFERENCE]
        return set.intersection(
            *(set(found) & set(joint.get(tokens, {})) for tokens, found in self._by_arm[arm].items())
        )

    def loss(self, tokens: int, arm: str = REFERENCE) -> float:
        return _between(self._medians(arm, lambda each, _: each.loss), tokens)

    def gap(self, tokens: int, arm: str) -> float:
        return _between(self._medians(arm, lambda each, joint: each.loss - joint.loss), tokens)

    def slope(self, tokens: int) -> float:
        """Fall of joint training's loss per e-fold of tokens, between the measured budgets next to `tokens` (nats)."""
        few, many = _neighbours(self.budgets(), tokens)
        return (self.loss(few) - self.loss(many)) / math.log(many / few)

    def nearest(self, tokens: int, arm: str) -> PieceResult:
        """The piece of an arm whose budget is nearest."""
        budget = min(self.budgets(arm), key=lambda each: abs(math.log(each / tokens)))
        return next(iter(self._by_arm[arm][budget].values()))

    def _medians(self, arm: str, value: Callable[[PieceResult, PieceResult], float]) -> dict[int, float]:
        joint, ours, seeds = self._by_arm[REFERENCE], self._by_arm[arm], self.seeds(arm)

        def median(tokens: int) -> float:
            return statistics.median(value(ours[tokens][seed], joint[tokens][seed]) for seed in seeds)

        return {tokens: median(tokens) for tokens in ours}


def advise(config: RunConfig, pieces: Iterable[PieceResult], serving_tokens: float = 0.0) -> Advice:
    """Options for a configuration.

    Args:
        config: The configuration.
        pieces: The measured pieces.
        serving_tokens: Tokens that the finished model will read and write, for which the high-memory pool is paid.

    Raises:
        ConfigError: The configuration is outside the range of what was measured.
    """
    tokens, price = config.tokens.total, _price(config.pools.low_memory) / _paid(config.pools.high_memory)
    flops = planned(config, KNOWN[REFERENCE]).stages[-1].cost.flops / tokens
    similar = _similar(config, pieces, flops)
    own = _nearest_shape(config, similar)
    _check_tokens(own, tokens)
    options = _options(config, own, price)
    shapes = [each for each in similar if _covers(each, REFERENCE, tokens) and each.slope(tokens) > 0]
    best = min(each.loss(tokens) for each in shapes)
    found = []
    for each in shapes:
        cheapest = _options(config, each, price)[0]
        training = (
            each.flops_per_token * tokens * cheapest.dollars * math.exp((each.loss(tokens) - best) / each.slope(tokens))
        )
        serving = each.flops_per_token / 3 * serving_tokens
        found.append(
            ShapeOption(
                experts=each.cell.experts,
                top_k=each.cell.top_k,
                arm=cheapest.arm,
                dollars=(training + serving) / (flops * tokens),
            )
        )
    return Advice(
        options=tuple(options),
        shapes=tuple(sorted(found, key=lambda each: each.dollars)),
        seeds=min(len(own.seeds(option.arm)) for option in options),
    )


def _similar(config: RunConfig, pieces: Iterable[PieceResult], flops: float) -> list[_Measured]:
    """What was measured with the configuration's family and kind of start, by shape, on one corpus and scale.

    They are those with models of about its size, where possible at its number of tokens, and then with the most pieces.

    Args:
        config: The configuration.
        pieces: The measured pieces.
        flops: Operations per token when the configuration's whole MoE trains.
    """
    start: Start = "random" if config.model.init == "random" else "seed"
    subjects: dict[tuple[str, str], list[PieceResult]] = {}
    for each in pieces:
        if (each.cell.family, each.cell.start) == (config.model.family_name, start):
            subjects.setdefault((each.cell.corpus, each.cell.scale), []).append(each)
    measured = [shapes for found in subjects.values() if (shapes := _by_shape(found))]
    if not measured:
        raise ConfigError("model.family", config.model.family_name, f"was not measured with the start {start!r}")
    sizes = [_range_of_flops(shapes) for shapes in measured]
    near = [
        shapes
        for shapes, (least, most) in zip(measured, sizes, strict=True)
        if least / SIZE_FACTOR <= flops <= most * SIZE_FACTOR
    ]
    if not near:
        raise ConfigError(
            "model",
            None,
            (
                f"has {flops:.3g} operations per token in training; measured are models with "
                f"{', '.join(f'{least:.3g} to {most:.3g}' for least, most in sorted(sizes))}, and "
                f"nothing is advised beyond {SIZE_FACTOR:g} times that; compare on your own text instead"
            ),
        )
    return max(
        near,
        key=lambda shapes: (
            any(_covers(each, REFERENCE, config.tokens.total) for each in shapes),
            sum(each.pieces for each in shapes),
        ),
    )


def _range_of_flops(shapes: Iterable[_Measured]) -> tuple[float, float]:
    flops = [each.flops_per_token for each in shapes]
    return min(flops), max(flops)


def _by_shape(pieces: Iterable[PieceResult]) -> list[_Measured]:
    """Pieces of one corpus and scale by number of experts and top-k, where joint training was measured."""
    shapes: dict[tuple[int, int], list[PieceResult]] = {}
    for each in pieces:
        shapes.setdefault((each.cell.experts, each.cell.top_k), []).append(each)
    return [_Measured(found) for found in shapes.values() if _has_joint(found)]


def _has_joint(pieces: Iterable[PieceResult]) -> bool:
    return any(each.arm == REFERENCE for each in pieces)


def _nearest_shape(config: RunConfig, similar: Sequence[_Measured]) -> _Measured:
    sizes = config.model.architecture
    share, shares = sizes.num_experts_per_tok / sizes.num_experts, [each.cell.active_share for each in similar]
    if not min(shares) <= share <= max(shares):
        raise ConfigError(
            "model.config.num_experts",
            sizes.num_experts,
            f"makes {share:.3g} of the experts active; measured is {min(shares):.3g} to {max(shares):.3g}",
        )
    return min(similar, key=lambda each: abs(math.log(each.cell.active_share / share)))


def _check_tokens(own: _Measured, tokens: int) -> None:
    budgets = own.budgets()
    if len(budgets) < 2 or own.slope(budgets[-1]) <= 0:
        raise ConfigError(
            "tokens.total",
            tokens,
            (
                f"needs the slope of joint training's loss, and {own.cell.experts} experts, top-{own.cell.top_k}, are "
                f"measured at {', '.join(f'{each:,}' for each in budgets) or 'no'} tokens only; measure a second "
                "budget with `python -m benchmarks.study grid --budgets 1,4`"
            ),
        )
    if not budgets[0] <= tokens <= budgets[-1]:
        raise ConfigError(
            "tokens.total", tokens, f"is outside what was measured: {budgets[0]:,} to {budgets[-1]:,} tokens"
        )


def _options(config: RunConfig, own: _Measured, price: float) -> list[Option]:
    tokens = config.tokens.total
    options = []
    for arm in own.arms:
        if arm in WITH_ADAMW or not _covers(own, arm, tokens):
            continue
        gap, piece = own.gap(tokens, arm), own.nearest(tokens, arm)
        cost = _cost(piece.phases, price) / _cost(own.nearest(piece.cell.tokens, REFERENCE).phases, price)
        options.append(
            Option(
                arm=arm,
                title=ROWS[arm],
                gap=gap,
                dollars=cost * math.exp(gap / own.slope(tokens)),
                settings=_settings(config, piece),
                tuned=piece.tuned is not None,
            )
        )
    return sorted(options, key=lambda each: each.dollars)


def _covers(own: _Measured, arm: str, tokens: int) -> bool:
    budgets = own.budgets(arm)
    return len(budgets) > 1 and budgets[0] <= tokens <= budgets[-1]


def _settings(config: RunConfig, piece: PieceResult) -> dict[str, Any]:
    """The settings of an arm; the number of sub-models keeps the number of experts of each."""
    found = {path: value for path, value in piece.settings.items() if path not in _OF_THE_SIZE} | {
        "finetune.pool": "high_memory"
    }
    if "clusters.count" in piece.recipe:
        group = piece.cell.experts // piece.recipe["clusters.count"]
        if config.model.architecture.num_experts % group == 0:
            found["clusters.count"] = config.model.architecture.num_experts // group
    if piece.arm in (JOINT_LOW, HALF):
        found["finetune.pool"] = "low_memory"
    if piece.arm == HALF:
        found["model.config.num_experts"] = half_of_experts(config)
    return found


def _cost(phases: Sequence[Phase], price: float) -> float:
    """Price of phases, an operation on the high-memory pool being 1, and one on the low-memory pool `price`."""
    return sum(phase.flops * (price if phase.pool == "low_memory" else 1.0) for phase in phases)


def _price(pool: AnyPool) -> float:
    return min(each.price_per_hour / each.speed for each in pool.node_types)


def _paid(pool: AnyPool) -> float:
    if not pool.price_per_hour:
        raise ConfigError(
            "pools.high_memory.price_per_hour", 0, "is needed to compare dollars; give the pool its price"
        )
    return _price(pool)


def _between(values: Mapping[int, float], tokens: int) -> float:
    """The value at a number of tokens, on straight lines over the log of the tokens."""
    few, many = _neighbours(sorted(values), tokens)
    if few == many:
        return values[few]
    return values[few] + (values[many] - values[few]) * math.log(tokens / few) / math.log(many / few)


def _neighbours(budgets: Sequence[int], tokens: int) -> tuple[int, int]:
    """The budgets next to a number of tokens, which may be one of them; twice the same one if there is one."""
    many = next(number for number, budget in enumerate(budgets) if budget >= tokens)
    return (budgets[max(0, many - 1)], budgets[max(many, min(1, len(budgets) - 1))])
