"""Audit log; each entry is written in the transaction of the action that it records."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text, cast, select
from sqlalchemy.orm import Session

from service.database import values
from service.database.access_tables import Audit
from service.database.ids import new_id
from service.database.paging import page_by_id


def note(
    session: Session,
    *,
    owner: str,
    token_id: str | None,
    action: str,
    target: str,
    detail: dict[str, Any],
    address: str | None,
    now: float,
) -> None:
    """Add an entry to the audit log, in the transaction of the action that it records.

    Args:
        session: Transaction of the action.
        owner: Owner that acted.
        token_id: Token that was used; None for the service itself and the command line.
        action: Action, such as `run.submit`, `run.cancel` or `token.create`.
        target: Id of the object of the action.
        detail: Details without secrets.
        address: Address of the client.
        now: Seconds since the epoch.
    """
    session.add(
        Audit(
            id=new_id(),
            time=now,
            owner=values.text(owner),
            token_id=token_id,
            action=action,
            target=values.text(target),
            detail=values.document(detail),
            address=None if address is None else values.text(address),
        )
    )


def mentions(session: Session, target: str) -> bool:
    """Whether an action on an object with this id was ever recorded."""
    return session.scalars(select(Audit.id).where(Audit.target == values.text(target)).limit(1)).first() is not None


def storage_detail(storage: str | None) -> dict[str, str]:
    """Detail of an entry on a deleted run: its own folder in `checkpoint.storage`, if any, with its URI's options."""
    return {} if storage is None else {"storage": storage}


def storages(session: Session) -> list[str]:
    """Folders of deleted runs in `checkpoint.storage`, as `storage_detail` recorded them."""
    recorded = cast(Audit.detail, Text).contains('"storage"', autoescape=True)
    found = session.scalars(select(Audit.detail).where(Audit.action.in_(("run.delete", "run.removed")), recorded))
    return [str(detail.get("storage", "")) for detail in found]


def page(session: Session, *, cursor: str | None, limit: int) -> tuple[list[Audit], str | None]:
    """Entries of the audit log, newest first, and the cursor of the next page, which is None on the last page."""
    return page_by_id(session, select(Audit), Audit.id, cursor=cursor, limit=limit, newest_first=True)
