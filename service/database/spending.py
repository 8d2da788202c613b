"""Metered dollars by owner, project and month, including deleted runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from service.database import projects, values
from service.database.access_tables import Spending
from service.domain.access import Person

Group = Literal["owner", "project", "month"]
MOST = 10_000
"""Maximum number of groups."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """Dollars of a group; a field by which is not grouped is None.

    Attributes:
        project: Id of the project; empty for dollars that were metered before there were projects.
    """

    owner: str | None
    project: str | None
    month: str | None
    dollars: float


def grouped(session: Session, person: Person, by: Sequence[Group], month: str | None = None) -> list[Spent]:
    """Dollars that a person may see: those of the person's runs and of the person's projects, or all.

    Args:
        session: Reading transaction.
        person: The person.
        by: Fields to group by.
        month: The only month to count; None counts all.
    """
    columns = [getattr(Spending, name) for name in by]
    query = select(*columns, func.sum(Spending.dollars)).group_by(*columns)
    newest = [Spending.month.desc()] if "month" in by else []
    query = query.order_by(*newest, *columns)
    if not person.admin:
        query = query.where(or_(Spending.owner == values.text(person.name), projects.visible(Spending.project, person)))
    if month is not None:
        query = query.where(Spending.month == month)
    empty: dict[str, str | None] = dict.fromkeys(("owner", "project", "month"))
    rows = session.execute(query.limit(MOST))
    return [Spent(**(empty | dict(zip(by, row[:-1], strict=True))), dollars=row[-1]) for row in rows]
