"""Loss of one recipe over its tokens: a saturating power law, or a simpler curve if few sizes were measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

_STEEPEST = 2.0
"""Maximum exponent that is tried; published exponents for language models over tokens are 0.05 to 0.4 (Kaplan et al., arXiv
2001.08361; Hoffmann et al., arXiv 2203.15556)."""
_GRID = 24
_GOLDEN = (math.sqrt(5) - 1) / 2
_REFINEMENTS = 32
_LARGEST_POWER = 600.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss over tokens, L(x) = level - slope * (1 - x^-exponent) / exponent, with x = tokens / unit.

    This equals L_inf + A tokens^-exponent with L_inf = level - slope / exponent, in a form that has a limit at exponent 0: the
    straight line level - slope * ln x.

    Attributes:
        unit: Tokens at which the loss is `level`.
        level: Loss at `unit` (nats per token).
        slope: Fall of the loss per unit of ln tokens at `unit` (nats per token); never negative.
        exponent: Exponent of the power law, which sets how fast the curve saturates; never negative.
    """

    unit: float
    level: float
    slope: float
    exponent: float = 0.0

    @property
    def floor(self) -> float:
        """L_inf, the limit of the loss for infinitely many tokens; minus infinity for a straight line."""
        if not self.slope:
            return self.level
        return self.level - self.slope / self.exponent if self.exponent else -math.inf

    def loss(self, tokens: float) -> float:
        """Loss after a number of tokens (nats per token)."""
        return self.level - self.slope * _fall(tokens / self.unit, self.exponent)

    def slope_at(self, tokens: float) -> float:
        """Fall of the loss per unit of ln tokens (nats per token)."""
        return self.slope * (tokens / self.unit) ** -self.exponent

    def tokens(self, loss: float) -> float:
        """Tokens to reach a loss, the inverse of `loss`; infinity if it is never reached, 0 if a flat curve is never above it."""
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
        tokens: Tokens of each run.
        loss: Mean loss of the runs.
        runs: Number of runs.
    """

    tokens: int
    loss: float
    runs: int = 1


def fit_curve(sizes: Sequence[Size]) -> Curve:
    """The least-squares curve through two sizes (a straight line over the logarithm of the tokens) or more (a power law).

    For a given exponent the law is linear in its other two parameters, so only the exponent is searched (variable projection,
    Golub and Pereyra 1973).

    Args:
        sizes: Measured sizes, at least two, all different.
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
    """The curve of a recipe that was measured at one size: its slope there is the mean slope of the other curves.

    Args:
        size: The only measured size of the recipe.
        others: Curves of other recipes, at least one.
    """
    return Curve(
        size.tokens, size.loss,
        slope=sum(curve.slope_at(size.tokens) for curve in others) / len(others),
        exponent=sum(curve.exponent for curve in others) / len(others))


def _fall(x: float, exponent: float) -> float:
    return -math.expm1(-exponent * math.log(x)) / exponent if exponent else math.log(x)


def _fit_linear(sizes: Sequence[Size], exponent: float) -> tuple[float, Curve]:
    """Least squared error, and the curve with the best level and slope, for a given exponent."""
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
