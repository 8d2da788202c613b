"""Training curves of a run's units, downsampled in the database so that long curves are never loaded whole."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from sqlalchemy import BigInteger, ColumnElement, CompoundSelect, Row, and_, func, literal, select, union_all
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.database import values
from service.database.tables import HeldOutPoint, Point, UnitRow

_FETCHED = 20_000
"""Maximum number of points of a curve that is loaded whole. A longer curve is divided into buckets of steps, and only
the minimum and maximum of each are loaded."""
_MOST_BUCKETS = 10_000
"""Maximum number of buckets per curve: each adds two parameters to a statement, which can have at most 32,766."""
_FIGURES: Mapping[str, type[Point | HeldOutPoint]] = MappingProxyType(
    {
        "held_out_loss": HeldOutPoint,
        **dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "largest_load", "dead_experts"), Point),
    }
)
"""Tables of the training metrics, whose columns have the names of the metrics."""


@dataclasses.dataclass(frozen=True)
class UnitCurve:
    """One training metric of one unit over its training.

    Attributes:
        steps: Steps of the points, ascending.
        tokens: Tokens that the unit had trained on at each point.
        values: Value of the metric at each point.
        count: Number of points before downsampling.
    """

    unit: str
    stage: str
    steps: list[int]
    tokens: list[int]
    values: list[float]
    count: int


def series(session: Session, run_id: str, figure: str, units: Sequence[str] | None, points: int) -> list[UnitCurve]:
    """Curves of a training metric, in the order in which the units started, with at most `points` points each.

    Raises:
        ValueError: There is no such metric.
    """
    if figure not in _FIGURES:
        raise ValueError(f"figure {figure!r} is unknown; use one of {', '.join(_FIGURES)}")
    table = _FIGURES[figure]
    query = select(UnitRow.unit, UnitRow.stage).where(UnitRow.run_id == run_id)
    if units is not None:
        query = query.where(UnitRow.unit.in_([values.text(unit) for unit in units]))
    rows = session.execute(query.order_by(UnitRow.started, UnitRow.unit)).all()
    curves = [_curve(session, run_id, unit, stage, table=table, figure=figure, points=points) for unit, stage in rows]
    return [curve for curve in curves if curve.count]


def _curve(
    session: Session, run_id: str, unit: str, stage: str, *, table: type[Point | HeldOutPoint], figure: str, points: int
) -> UnitCurve:
    column: InstrumentedAttribute[float | None] = getattr(table, figure)
    of_curve = and_(table.run_id == run_id, table.unit == unit, column.is_not(None))
    count, first, last = session.execute(
        select(func.count(), func.min(table.step), func.max(table.step)).where(of_curve)
    ).one()
    query = select(table.step, table.tokens, column).where(of_curve).order_by(table.step)
    if count > _FETCHED:
        width = 1 + (last - first) // min(2 * points, _MOST_BUCKETS)
        # Not a subquery: PostgreSQL would run it again for every point.
        extremes = session.scalars(_extremes(of_curve, table, column, first=first, last=last, width=width))
        query = query.where(table.step.in_({first, last, *extremes} - {None}))
    rows: Sequence[Row[int, int, float | None]] = session.execute(query).all() if count else ()
    figures = [value for _, _, value in rows if value is not None]
    kept = downsample(figures, points)
    return UnitCurve(
        unit,
        stage,
        steps=[rows[at][0] for at in kept],
        tokens=[rows[at][1] for at in kept],
        values=[figures[at] for at in kept],
        count=count,
    )


def _extremes(
    of_curve: ColumnElement[bool],
    table: type[Point | HeldOutPoint],
    column: InstrumentedAttribute[float | None],
    *,
    first: int,
    last: int,
    width: int,
) -> CompoundSelect[int | None]:
    """Query the steps of the minimum and maximum in each bucket of `width` steps.

    A bucket is a range of the primary key.
    """
    bucket = select(literal(first, BigInteger).label("low")).cte("bucket", recursive=True)
    bucket = bucket.union_all(select(bucket.c.low + width).where(bucket.c.low + width <= last))
    walk = select(table.step).where(of_curve, table.step >= bucket.c.low, table.step < bucket.c.low + width)
    lowest, highest = (
        walk.order_by(order, table.step).limit(1).correlate(bucket).scalar_subquery()
        for order in (column.asc(), column.desc())
    )
    return union_all(select(lowest).select_from(bucket), select(highest).select_from(bucket))


def downsample(values: Sequence[float], most: int) -> list[int]:
    """Choose at most `most` points that keep a curve's shape: its ends, and the minimum and maximum of equal buckets.

    Returns the indices of the points, ascending. They include the ends, the minimum and the maximum even if `most` is
    below 4.
    """
    count = len(values)
    if count <= max(most, 4):
        return list(range(count))
    buckets = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for low, high in _spans(count - 2, buckets):
        bucket = range(low, high + 1)
        kept |= {min(bucket, key=values.__getitem__), max(bucket, key=values.__getitem__)}
    return sorted(kept)


def _spans(last: int, count: int) -> list[tuple[int, int]]:
    """Divide the numbers from 1 to `last` into at most `count` ranges of nearly equal size, each as (first, last)."""
    count = min(count, last)
    cuts = [1 + last * number // count for number in range(count + 1)] if count > 0 else []
    return [(low, high - 1) for low, high in itertools.pairwise(cuts)]
