"""Pages of lists in the order of their rows' ids, which is the order of creation."""

from __future__ import annotations

from typing import TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

Row = TypeVar("Row")


def page_by_id(
    session: Session,
    query: Select[Row],
    key: InstrumentedAttribute[str],
    *,
    cursor: str | None,
    limit: int,
    newest_first: bool = False,
) -> tuple[list[Row], str | None]:
    """A page of the rows of a query.

    A cursor is the id of the last row on the previous page. It stays valid if that row is deleted.

    Args:
        session: Any transaction.
        query: Rows of the whole list.
        key: Column with the id of the rows.
        cursor: Cursor of the page; None for the first page.
        limit: Maximum number of rows.
        newest_first: Whether the newest row comes first instead of the oldest one.

    Returns:
        The rows, and the cursor of the next page, which is None on the last page.
    """
    if cursor is not None:
        query = query.where(key < cursor if newest_first else key > cursor)
    found = list(session.scalars(query.order_by(key.desc() if newest_first else key).limit(limit + 1)))
    return found[:limit], getattr(found[limit - 1], key.key) if len(found) > limit else None
