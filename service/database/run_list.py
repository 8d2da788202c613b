"""Queries for lists of runs in any order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Float, and_, case, exists, func, literal, literal_column, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.database import projects, values
from service.database.runs import LEFT_OUT
from service.database.tables import RunRow
from service.domain.run_list import (
    FIELDS,
    NEWEST,
    NULLABLE,
    TEXTS,
    Field,
    Operator,
    Order,
    Position,
    Selection,
    parse_cursor,
    to_cursor,
)

_COLUMNS: Mapping[Field, InstrumentedAttribute[Any]] = {field: getattr(RunRow, field) for field in FIELDS}
_COMPARISONS: Mapping[Operator, Callable[[Any, Any], ColumnElement[bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
}


def page(
    session: Session, selection: Selection, *, order: Order = NEWEST, cursor: str | None = None, limit: int
) -> tuple[list[RunRow], str | None]:
    """Runs that pass the filters, in an order.

    The ids are found first, in an index, and only then the rows of the page, because each holds large documents.

    Args:
        session: Any transaction.
        selection: Filters.
        order: Field by which the runs are sorted. Texts are compared by code points in every database.
        cursor: Cursor from the previous page of a list in the same order.
        limit: Maximum number of runs.

    Returns:
        The runs, whose `config` and `meter` are loaded on access, and the cursor of the next page, which is None on the
        last page.

    Raises:
        InvalidRequest: The cursor is not one of a list in this order.
    """
    dialect = session.get_bind().dialect.name
    column, descending = _sorted_by(dialect, order.field), order.descending
    query = select(RunRow.id, _COLUMNS[order.field]).where(*_conditions(dialect, selection))
    if cursor is not None:
        query = query.where(_after(column, order, parse_cursor(order, cursor)))
    if order.field in NULLABLE:
        query = query.order_by(column.is_(None))
    keys = (column.desc(), RunRow.id.desc()) if descending else (column, RunRow.id)
    found = session.execute(query.order_by(*keys).limit(limit + 1)).all()
    shown = found[:limit]
    rows = _rows(session, [run_id for run_id, _ in shown])
    if len(found) <= limit:
        return rows, None
    run_id, value = shown[-1]
    return rows, to_cursor(order, Position(value, run_id))


def ids(session: Session, selection: Selection, limit: int) -> list[str]:
    """Ids of the runs that pass the filters, newest first."""
    query = select(RunRow.id).where(*_conditions(session.get_bind().dialect.name, selection))
    return list(session.scalars(query.order_by(RunRow.created.desc(), RunRow.id.desc()).limit(limit)))


def _rows(session: Session, run_ids: list[str]) -> list[RunRow]:
    found = {run.id: run for run in session.scalars(select(RunRow).options(*LEFT_OUT).where(RunRow.id.in_(run_ids)))}
    return [found[run_id] for run_id in run_ids if run_id in found]


def _sorted_by(dialect: str, field: Field) -> ColumnElement[Any]:
    column = _COLUMNS[field]
    if field not in TEXTS or dialect == "sqlite":  # SQLite compares bytes, as "C" does
        return column.expression
    return column.collate("C")


def _after(column: ColumnElement[Any], order: Order, position: Position) -> ColumnElement[bool]:
    """Whether a run comes after a position: it has a later value, an equal one and a later id, or none."""
    later = operator.lt if order.descending else operator.gt
    later_id: ColumnElement[bool] = later(RunRow.id, values.text(position.run_id))
    if position.value is None:
        return and_(column.is_(None), later_id)
    value = values.text(position.value) if isinstance(position.value, str) else position.value
    reached = or_(later(column, value), and_(column == value, later_id))
    return or_(reached, column.is_(None)) if order.field in NULLABLE else reached


def _conditions(dialect: str, selection: Selection) -> Iterator[ColumnElement[bool]]:
    if selection.person is not None:
        yield projects.visible(RunRow.project, selection.person)
    if selection.project is not None:
        yield projects.named(RunRow.project, selection.project)
    if selection.owner is not None:
        yield RunRow.owner == values.text(selection.owner)
    if selection.states:
        yield RunRow.state.in_([state.value for state in selection.states])
    if selection.name:
        yield RunRow.name.icontains(values.text(selection.name), autoescape=True)
    if selection.created_after is not None:
        yield RunRow.created >= selection.created_after
    if selection.created_before is not None:
        yield RunRow.created < selection.created_before
    for each in selection.where:
        # a typed value: PostgreSQL would otherwise round it to the type of the column
        yield _COMPARISONS[each.operator](_COLUMNS[each.field], literal(each.value, Float))
    for key, value in selection.tags.items():
        yield _has_tag(dialect, values.text(key), values.text(value))


def _has_tag(dialect: str, key: str, value: str) -> ColumnElement[bool]:
    # SQLite does not check what is stored: a row without valid JSON would fail the query.
    each = (
        func.json_each(case((func.json_valid(RunRow.tags) == 1, RunRow.tags), else_=literal_column("'{}'")))
        if dialect == "sqlite"
        else func.json_each_text(RunRow.tags)
    )
    tag = each.table_valued("key", "value", name="tag")
    return exists(select(1).select_from(tag).where(tag.c.key == key, tag.c.value == value))
