"""Webhooks and their outbox: a delivery is written in the transaction of the change it reports."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from typing import Any, Literal

from sqlalchemy import delete as delete_from
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.database import values
from service.database.ids import new_id
from service.database.tables import Delivery, RunRow, Webhook
from service.domain.states import RunState

MessageType = Literal["run.state", "run.expiring", "run.removed"]


def create(session: Session, *, owner: str, url: str, states: Sequence[RunState], now: float) -> Webhook:
    """Create a webhook that reports an owner's runs in any of `states`, or in all if it is empty; the row contains the secret."""
    webhook = Webhook(
        id=new_id(), owner=owner, url=values.text(url), secret=f"whsec_{secrets.token_urlsafe(32)}",
        states=[state.value for state in states], created=now)
    session.add(webhook)
    session.flush()
    return webhook


def get(session: Session, webhook_id: str) -> Webhook | None:
    """A webhook by its id."""
    return session.get(Webhook, values.text(webhook_id))


def page(session: Session, owner: str | None) -> list[Webhook]:
    """Webhooks of an owner, or of all owners, oldest first."""
    chosen = select(Webhook) if owner is None else select(Webhook).where(Webhook.owner == owner)
    return list(session.scalars(chosen.order_by(Webhook.id)))


def delete(session: Session, webhook: Webhook) -> None:
    """Delete a webhook with its deliveries."""
    session.execute(delete_from(Webhook).where(Webhook.id == webhook.id))


def enqueue(session: Session, run: RunRow, now: float, message_type: MessageType = "run.state", **more: Any) -> None:
    """Write a delivery about a run for each webhook that reports the run's state; `more` adds fields to the message."""
    for webhook in page(session, run.owner):
        if webhook.states and run.state not in webhook.states:
            continue
        delivery = new_id()
        body = {
            "id": delivery, "type": message_type, "time": now,
            "run": {"id": run.id, "name": run.name, "owner": run.owner, "state": run.state, "reason": run.reason,
                    "attempt": run.attempt, "dollars": run.dollars}, **more}
        session.add(Delivery(
            id=delivery, webhook_id=webhook.id, run_id=run.id, body=body, created=now, attempts=0, due=now, delivered=None,
            answer=None))
    session.flush()


def due(session: Session, now: float, most: int, under_way: Collection[str] = ()) -> list[tuple[Delivery, Webhook]]:
    """Due deliveries with their webhooks, the earliest due first.

    Args:
        session: Any transaction.
        now: Seconds since the epoch.
        most: Maximum number of deliveries of one webhook.
        under_way: Ids of deliveries to leave out.
    """
    place = func.row_number().over(partition_by=Delivery.webhook_id, order_by=(Delivery.due, Delivery.id)).label("place")
    first = select(Delivery.id, place).where(Delivery.due <= now, Delivery.id.not_in(under_way)).subquery()
    rows = session.execute(
        select(Delivery, Webhook).join(Webhook, Webhook.id == Delivery.webhook_id).join(first, first.c.id == Delivery.id)
        .where(first.c.place <= most).order_by(Delivery.due, Delivery.id))
    return [(delivery, webhook) for delivery, webhook in rows]


def record_attempt(session: Session, delivery_id: str, *, delivered: float | None, answer: str, due: float | None) -> None:
    """Store the result of an attempt to deliver.

    Args:
        session: Writing transaction.
        delivery_id: Id of the delivery.
        delivered: Time at which the message arrived; None if the attempt failed.
        answer: HTTP status of the receiver's response, or the error.
        due: Time of the next attempt; None if there will be none.
    """
    session.execute(
        update(Delivery).where(Delivery.id == delivery_id)
        .values(attempts=Delivery.attempts + 1, delivered=delivered, answer=values.text(answer, 500), due=due))


def retry(session: Session, delivery_id: str, now: float) -> bool:
    """Make a delivery due at once; returns whether it exists."""
    return session.execute(
        update(Delivery).where(Delivery.id == values.text(delivery_id)).values(due=now, delivered=None)
        .returning(Delivery.id)).scalar() is not None


def deliveries(session: Session, webhook_id: str, limit: int = 100) -> list[Delivery]:
    """A webhook's deliveries, newest first."""
    return list(session.scalars(
        select(Delivery).where(Delivery.webhook_id == values.text(webhook_id)).order_by(Delivery.id.desc()).limit(limit)))


def purge(session: Session, before: float) -> None:
    """Delete finished deliveries that were created before a time."""
    session.execute(delete_from(Delivery).where(Delivery.due.is_(None), Delivery.created < before))
