"""Reads and writes all rows of a database in a form that does not depend on the kind of database.

A row is a list of JSON values, one for each column. JSON documents are the stored text, unchanged, so that a document
which this version cannot read is kept as it is.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    cast,
    column,
    exists,
    insert,
    inspect,
    select,
    table,
)
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import BindParameter, ColumnElement

from service.database import values
from service.database.session import Database

Row = list[Any]
_LEFT_OUT = frozenset({"alembic_version", "leases", "last_done"})
"""Tables about the running processes, which a backup does not contain."""
_AT_ONCE = 500
"""Number of rows that are read or written with one statement."""


class ColumnShape(BaseModel):
    """Name and kind of a column; `plain` values are numbers and texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["plain", "json", "bytes", "boolean"]


class TableShape(BaseModel):
    """Name and columns of a table, in the order in which rows have their values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    columns: tuple[ColumnShape, ...]


@contextlib.contextmanager
def snapshot(url: str, scratch: Path) -> Iterator[Session]:
    """Read a database as it is at one moment, while others write to it.

    Args:
        url: URL of the database.
        scratch: Empty directory for a copy of a SQLite database: a long reading transaction on the database itself
            would keep SQLite from shortening its write-ahead log.

    Raises:
        DatabaseError: The database does not answer.
        sqlite3.Error: The SQLite database cannot be read, or the disk of the copy is full.
    """
    if url.startswith("sqlite:"):
        copy = scratch / "copy.sqlite3"
        copy.touch(0o600)
        with (
            contextlib.closing(sqlite3.connect(str(make_url(url).database))) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        url = f"sqlite:///{copy}"
    with contextlib.closing(Database(url)) as database, database.read() as session:
        yield session


def tables(session: Session) -> list[TableShape]:
    """The tables of a database, those first to which others refer."""
    return [TableShape(name=found.name, columns=_columns(found)) for found in _reflected(session)]


def is_empty(session: Session) -> bool:
    """Whether a database has no rows, apart from those about running processes."""
    return not any(session.scalar(select(exists(select(found)))) for found in _reflected(session))


def has_table(session: Session, name: str) -> bool:
    """Whether a database has a table."""
    return inspect(session.connection()).has_table(name)


def rows(session: Session, shape: TableShape) -> Iterator[Row]:
    """All rows of a table."""
    found = table(shape.name, *(_column(each, "sqlite") for each in shape.columns))
    # The text of a document: as JSON, it would be parsed and written again.
    columns = [
        cast(found.c[each.name], Text).label(each.name) if each.kind == "json" else found.c[each.name]
        for each in shape.columns
    ]
    for row in session.execute(select(*columns), execution_options={"yield_per": _AT_ONCE}):
        yield [_portable(value) for value in row]


def store(session: Session, shape: TableShape, found: Sequence[Row]) -> None:
    """Insert rows into a table."""
    dialect = session.get_bind().dialect.name
    target = table(shape.name, *(_column(each, dialect) for each in shape.columns))
    for first in range(0, len(found), _AT_ONCE):
        batch = found[first : first + _AT_ONCE]
        session.execute(insert(target), [_bound(shape, row, dialect) for row in batch])


class _JsonText(TypeDecorator[str]):
    """JSON for PostgreSQL, given as text."""

    impl = Text
    cache_ok = True

    def bind_expression(self, bindparam: BindParameter[str]) -> ColumnElement[Any]:
        """Cast the text."""
        return cast(bindparam, JSON)


def _reflected(session: Session) -> list[Table]:
    found = MetaData()
    found.reflect(session.connection())
    return [each for each in found.sorted_tables if each.name not in _LEFT_OUT]


def _columns(found: Table) -> tuple[ColumnShape, ...]:
    return tuple(ColumnShape(name=each.name, kind=_kind(each)) for each in found.columns)


def _kind(found: Column[Any]) -> Literal["plain", "json", "bytes", "boolean"]:
    if isinstance(found.type, JSON):
        return "json"
    if isinstance(found.type, LargeBinary):
        return "bytes"
    return "boolean" if isinstance(found.type, Boolean) else "plain"


def _column(shape: ColumnShape, dialect: str) -> Any:
    if shape.kind == "json":
        return column(shape.name, _JsonText() if dialect == "postgresql" else Text())
    if shape.kind == "bytes":
        return column(shape.name, LargeBinary())
    return column(shape.name, Boolean()) if shape.kind == "boolean" else column(shape.name)


def _portable(value: Any) -> Any:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value


def _bound(shape: TableShape, row: Row, dialect: str) -> dict[str, Any]:
    return {each.name: _value(each, value, dialect) for each, value in zip(shape.columns, row, strict=True)}


def _value(shape: ColumnShape, value: Any, dialect: str) -> Any:
    if value is None:
        return None
    if shape.kind == "bytes":
        return base64.b64decode(value)
    if dialect != "postgresql" or not isinstance(value, str):
        return value
    return _valid_json(value) if shape.kind == "json" else values.text(value)


def _valid_json(text: str) -> str:
    """The text if PostgreSQL accepts it as JSON; otherwise a JSON text of it, which reads as a damaged document."""
    try:
        json.loads(text, parse_constant=_refuse)
    except ValueError:
        return json.dumps(text)
    return text


def _refuse(constant: str) -> None:
    raise ValueError(constant)
