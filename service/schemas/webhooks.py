"""Webhooks and their deliveries."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from service.domain.states import RunState
from service.schemas.base import Document, example


class WebhookRequest(Document):
    """Somebody to tell of state changes."""

    model_config = example(url="https://example.org/moedisco", states=["succeeded", "failed"])

    url: Annotated[str, Field(max_length=2048, pattern=r"^https?://")]
    states: Annotated[list[RunState], Field(max_length=7)] = Field(default_factory=list)
    """Empty: all."""


class WebhookInfo(Document):
    """A webhook."""

    id: str
    url: str
    states: list[RunState]
    created: float


class NewWebhook(WebhookInfo):
    """A webhook with the secret its deliveries are signed with, shown this once."""

    secret: str


class WebhookPage(Document):
    """Webhooks, oldest first."""

    items: list[WebhookInfo]


class DeliveryInfo(Document):
    """One message to a webhook."""

    id: str
    run_id: str
    created: float
    attempts: int
    due: float | None
    delivered: float | None
    answer: str | None


class DeliveryPage(Document):
    """Deliveries, newest first, at most 100."""

    items: list[DeliveryInfo]
