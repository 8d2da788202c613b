"""Routes of webhooks and their deliveries."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy.orm import Session

from service.api.answers import owner_filter
from service.api.bodies import StrictRoute
from service.api.context import InContext
from service.api.openapi import Responses, links, problems
from service.api.parameters import ThingId
from service.api.security import SIGNED_IN, Caller, Submitter, require_token
from service.api.submission import note
from service.database import tables, webhooks
from service.errors import Conflict, NotFound
from service.schemas import DeliveryInfo, DeliveryPage, NewWebhook, WebhookInfo, WebhookPage, WebhookRequest

MOST = 100

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=StrictRoute, dependencies=SIGNED_IN)
_ABOUT: Responses = {201: {
    "description": "The webhook.", "links": links("delete_webhook", "list_deliveries", parameter="webhook_id")}}


@router.get("", responses=problems())
def list_webhooks(caller: Submitter, context: InContext) -> WebhookPage:
    """List webhooks, oldest first: the caller's own, or those of all owners for an administrator."""
    with context.database.read() as session:
        return WebhookPage(items=[WebhookInfo.of(row) for row in webhooks.page(session, owner_filter(caller))])


@router.post("", status_code=201, responses=_ABOUT | problems(409, body=True))
def create_webhook(body: WebhookRequest, caller: Submitter, context: InContext) -> NewWebhook:
    """Create a webhook for the caller's runs. Its secret is shown only once. Not allowed in a browser session."""
    require_token(caller)
    now = context.now()
    with context.database.write() as session:
        if len(webhooks.page(session, caller.owner)) >= MOST:
            raise Conflict(f"you have {MOST} webhooks, the limit; delete one first")
        row = webhooks.create(session, owner=caller.owner, url=body.url, states=body.states, now=now)
        note(session, caller, "webhook.create", row.id, now=now, detail={"url": body.url})
    return NewWebhook.model_validate({**WebhookInfo.of(row).model_dump(), "secret": row.secret})


@router.delete("/{webhook_id}", status_code=204, responses=problems(404))
def delete_webhook(webhook_id: ThingId, caller: Submitter, context: InContext) -> None:
    """Delete a webhook and its pending deliveries."""
    now = context.now()
    with context.database.write() as session:
        row = _visible(session, caller, webhook_id)
        webhooks.delete(session, row)
        note(session, caller, "webhook.delete", webhook_id, now=now, detail={"url": row.url})


@router.get("/{webhook_id}/deliveries", responses=problems(404))
def list_deliveries(webhook_id: ThingId, caller: Submitter, context: InContext) -> DeliveryPage:
    """List the deliveries of a webhook with their results, newest first."""
    with context.database.read() as session:
        row = _visible(session, caller, webhook_id)
        return DeliveryPage(items=[DeliveryInfo.of(delivery) for delivery in webhooks.deliveries(session, row.id)])


@router.post("/{webhook_id}/deliveries/{delivery_id}/retry", status_code=204, responses=problems(404))
def retry_delivery(webhook_id: ThingId, delivery_id: ThingId, caller: Submitter, context: InContext) -> None:
    """Send a delivery again, without waiting for its next scheduled attempt."""
    now = context.now()
    with context.database.write() as session:
        row = _visible(session, caller, webhook_id)
        if delivery_id not in {delivery.id for delivery in webhooks.deliveries(session, row.id)}:
            raise NotFound("there is no such delivery of this webhook")
        webhooks.retry(session, delivery_id, now)
        note(session, caller, "webhook.retry", webhook_id, now=now, detail={"delivery": delivery_id})


def _visible(session: Session, caller: Caller, webhook_id: str) -> tables.Webhook:
    row = webhooks.get(session, webhook_id)
    if row is None or not (caller.admin or row.owner == caller.owner):
        raise NotFound("there is no such webhook, or it is not yours")
    return row
