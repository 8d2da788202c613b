"""How the loss of one recipe falls with its tokens: a saturating power law, or what is left of it where few sizes were measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

_STEEPEST = 2.0
"""Largest exponent that is tried; those of language models over tokens are 0.05 to 0.4 (Kaplan et al., arXiv 2001.08361;
Hoffmann et al., arXiv 2203.15556)."""
_GRID = 24
_GOLDEN = (math.sqrt(5) - 1) / 2
_REFINEMENTS = 32
_LARGEST_POWER = 600.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss over tokens, L(x) = level - slope * (1 - x^-exponent) / exponent, with x = tokens / unit.

    That is L_inf + A tokens^-exponent, with L_inf = level - slope / exponent, written so that an exponent of 0 is its limit: the
    straight line level - slope * ln x.

    Attributes:
        unit: Tokens at which the loss is `level`.
        level: Nats per token.
        slope: Nats that the loss falls by at `unit` where the logarithm of the tokens grows by one; never negative.
        exponent: How fast that saturates; never negative.
    """

    unit: float
    level: float
    slope: float
    exponent: float = 0.0

    @property
    def floor(self) -> float:
        """L_inf: what no amount of tokens comes below; of a straight line, minus infinity."""
        if not self.slope:
            return self.level
        return self.level - self.slope / self.exponent if self.exponent else -math.inf

    def loss(self, tokens: float) -> float:
        """Nats per token after a number of tokens."""
        return self.level - self.slope * _fall(tokens / self.unit, self.exponent)

    def slope_at(self, tokens: float) -> float:
        """Nats that the loss falls by where the logarithm of the tokens grows by one."""
        return self.slope * (tokens / self.unit) ** -self.exponent

    def tokens(self, loss: float) -> float:
        """The inverse of `loss`: infinity for what is never reached, 0 for what a flat curve is never above."""
        if not self.slope:
            return 0.0 if loss >= self.level else math.inf
        fall = (self.level - loss) / self.slope
        if self.exponent:
            left = 1 - self.exponent * fall
            power = -math.log(left) / self.exponent if left > 0 else math.inf
        else:
            power = fall
        return self.unit * math.exp(power) if power < _LARGEST_POWER else math.inf


@dataclasses.dataclass(frozen=True)
class Size:
    """All runs of a recipe that have the same number of tokens.

    Attributes:
        tokens: Each.
        loss: Their mean.
        runs: How many.
    """

    tokens: int
    loss: float
    runs: int = 1


def fit_curve(sizes: Sequence[Size]) -> Curve:
    """The least-squares curve through two sizes (a straight line over the logarithm of the tokens) or more (a power law).

    For a given exponent the law is linear in its other two numbers, so that the search is over one number (variable projection,
    Golub and Pereyra 1973).

    Args:
        sizes: At least two, all different.
    """
    if len(sizes) == 2:
        return _fit_linear(sizes, 0.0)[1]

    def error(exponent: float) -> float:
        return _fit_linear(sizes, exponent)[0]

    grid = [_STEEPEST * (i / _GRID) ** 2 for i in range(_GRID + 1)]
    best = min(range(len(grid)), key=lambda i: error(grid[i]))
    low, high = grid[max(0, best - 1)], grid[min(_GRID, best + 1)]
    for _ in range(_REFINEMENTS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if error(left) <= error(right):
            high = right
        else:
            low = left
    return _fit_linear(sizes, min((low, high, grid[best]), key=error))[1]


def through_one(size: Size, others: Sequence[Curve]) -> Curve:
    """The curve of a recipe that was measured at one size: as steep there, on the average, as those of the others.

    Args:
        size: The only one.
        others: At least one.
    """
    return Curve(
        size.tokens, size.loss,
        slope=sum(curve.slope_at(size.tokens) for curve in others) / len(others),
        exponent=sum(curve.exponent for curve in others) / len(others))


def _fall(x: float, exponent: float) -> float:
    return -math.expm1(-exponent * math.log(x)) / exponent if exponent else math.log(x)


def _fit_linear(sizes: Sequence[Size], exponent: float) -> tuple[float, Curve]:
    """Squared error and curve of the best level and slope."""
    runs = sum(size.runs for size in sizes)
    unit = math.exp(sum(size.runs * math.log(size.tokens) for size in sizes) / runs)
    falls = [_fall(size.tokens / unit, exponent) for size in sizes]
    middle = sum(size.runs * fall for size, fall in zip(sizes, falls, strict=True)) / runs
    mean = sum(size.runs * size.loss for size in sizes) / runs
    spread = sum(size.runs * (fall - middle) ** 2 for size, fall in zip(sizes, falls, strict=True))
    together = sum(size.runs * (fall - middle) * (size.loss - mean) for size, fall in zip(sizes, falls, strict=True))
    slope = max(0.0, -together / spread)
    curve = Curve(unit, mean + slope * middle, slope, exponent)
    return sum(size.runs * (size.loss - curve.loss(size.tokens)) ** 2 for size in sizes), curve
