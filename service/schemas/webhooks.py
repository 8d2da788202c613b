"""Webhooks and their deliveries."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from service.domain.states import RunState
from service.schemas.base import Document, example


class WebhookRequest(Document):
    """A webhook to create."""

    model_config = example(url="https://example.org/moedisco", states=["succeeded", "failed"])

    url: Annotated[str, Field(max_length=2048, pattern=r"^https?://")]
    states: Annotated[list[RunState], Field(max_length=7)] = Field(default_factory=list)
    """States of runs that the webhook reports; an empty list means all states."""


class WebhookInfo(Document):
    """A webhook."""

    id: str
    url: str
    states: list[RunState]
    created: float


class NewWebhook(WebhookInfo):
    """A webhook with the secret that signs its deliveries; the secret is shown only once."""

    secret: str


class WebhookPage(Document):
    """Webhooks, oldest first."""

    items: list[WebhookInfo]


class DeliveryInfo(Document):
    """A message to a webhook."""

    id: str
    run_id: str
    created: float
    attempts: int
    due: float | None
    """Time of the next attempt; null after the delivery has arrived or was given up."""
    delivered: float | None
    answer: str | None
    """HTTP status of the response to the last attempt, or the error."""


class DeliveryPage(Document):
    """Deliveries, newest first, at most 100."""

    items: list[DeliveryInfo]
