"""Curves of a run's units, thinned where they lie: a million points never leave the database."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from sqlalchemy import BigInteger, CompoundSelect, Row, and_, func, literal, select, union_all
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.database import values
from service.database.tables import Point, UnitRow

_FETCHED = 20_000
"""Points of one curve that are looked at here; of more, the database picks the extremes of equal buckets of steps."""
_STRETCHES = 10_000
"""Most of them; two points of each are asked for by step, and a statement takes 32,766 values."""
_FIGURES: tuple[str, ...] = ("loss", "lr", "grad_norm", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class UnitCurve:
    """One figure of one unit over its training.

    Attributes:
        unit: Whose.
        stage: Which stage the unit belongs to.
        steps: Of each point, ascending.
        tokens: The unit has seen by then.
        values: Of the figure.
        count: Points before thinning.
    """

    unit: str
    stage: str
    steps: list[int]
    tokens: list[int]
    values: list[float]
    count: int


def series(session: Session, run_id: str, figure: str, units: Sequence[str] | None, points: int) -> list[UnitCurve]:
    """Curves of a figure, in the order in which the units started.

    Args:
        session: Any.
        run_id: Whose.
        figure: `loss`, `lr`, `grad_norm` or `tokens_per_second`.
        units: Only these; None: all.
        points: At most so many per curve, the ends and the extremes among them.

    Raises:
        ValueError: There is no such figure.
    """
    if figure not in _FIGURES:
        raise ValueError(f"figure {figure!r} is none of {', '.join(_FIGURES)}")
    column: InstrumentedAttribute[float | None] = getattr(Point, figure)
    chosen = select(UnitRow.unit, UnitRow.stage).where(UnitRow.run_id == run_id)
    if units is not None:
        chosen = chosen.where(UnitRow.unit.in_([values.text(unit) for unit in units]))
    rows = session.execute(chosen.order_by(UnitRow.started, UnitRow.unit)).all()
    curves = [_curve(session, run_id, unit, stage, column, points) for unit, stage in rows]
    return [curve for curve in curves if curve.count]


def _curve(
    session: Session, run_id: str, unit: str, stage: str, column: InstrumentedAttribute[float | None], points: int,
) -> UnitCurve:
    mine = and_(Point.run_id == run_id, Point.unit == unit, column.is_not(None))
    count, first, last = session.execute(
        select(func.count(), func.min(Point.step), func.max(Point.step)).where(mine)).one()
    chosen = select(Point.step, Point.tokens, column).where(mine).order_by(Point.step)
    if count > _FETCHED:
        width = 1 + (last - first) // min(2 * points, _STRETCHES)
        # Not as a subquery: PostgreSQL would walk all of it again for every point.
        extremes = session.scalars(_extremes(run_id, unit, column, first, last, width))
        chosen = chosen.where(Point.step.in_({first, last, *extremes} - {None}))
    rows: Sequence[Row[int, int, float | None]] = session.execute(chosen).all() if count else ()
    figures = [value for _, _, value in rows if value is not None]
    kept = downsample(figures, points)
    return UnitCurve(unit, stage, [rows[at][0] for at in kept], [rows[at][1] for at in kept], [figures[at] for at in kept], count)


def _extremes(
    run_id: str, unit: str, column: InstrumentedAttribute[float | None], first: int, last: int, width: int,
) -> CompoundSelect[int | None]:
    """The steps of the lowest and the highest value in each stretch of `width` steps: short walks along the primary key."""
    stretch = select(literal(first, BigInteger).label("low")).cte("stretch", recursive=True)
    stretch = stretch.union_all(select(stretch.c.low + width).where(stretch.c.low + width <= last))
    walk = select(Point.step).where(
        Point.run_id == run_id, Point.unit == unit, column.is_not(None),
        Point.step >= stretch.c.low, Point.step < stretch.c.low + width)
    lowest, highest = (
        walk.order_by(order, Point.step).limit(1).correlate(stretch).scalar_subquery() for order in (column.asc(), column.desc()))
    return union_all(select(lowest).select_from(stretch), select(highest).select_from(stretch))


def downsample(values: Sequence[float], most: int) -> list[int]:
    """Which points of a curve to keep.

    The points between the ends are cut into equal buckets, and the lowest and the highest of each stretch are kept.

    Args:
        values: The curve's values in order; finite.
        most: Keep at most so many; below 4, still the ends and the extremes.

    Returns:
        Indices in ascending order: the first, the last, the lowest and the highest point of the curve among them.
    """
    count = len(values)
    if count <= max(most, 4):
        return list(range(count))
    buckets = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for low, high in _spans(1, count - 2, buckets):
        stretch = range(low, high + 1)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def _spans(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Cut the whole numbers from `first` to `last` into at most `count` buckets whose lengths differ by at most one.

    Returns:
        The first and the last number of each stretch.
    """
    length = last - first + 1
    count = min(count, length)
    cuts = [first + length * number // count for number in range(count + 1)] if count > 0 else []
    return [(low, high - 1) for low, high in itertools.pairwise(cuts)]
