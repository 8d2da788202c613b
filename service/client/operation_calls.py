"""Calls about what runs run on, and about who may ask."""

from __future__ import annotations

import json
from collections.abc import Sequence

from moedisco_ray.plan import Plan
from service.client.calls import Call, body, segment
from service.client.parsing import document, nothing
from service.client.run_calls import Configuration, plain_config
from service.domain.states import RunState
from service.schemas import (
    DeliveryPage,
    Identity,
    NewToken,
    NewWebhook,
    Pools,
    PriceBook,
    Scope,
    TokenPage,
    WebhookPage,
)


def identity() -> Call[Identity]:
    """GET /v1/identity."""
    return Call("GET", "/v1/identity", document(Identity))


def estimate(config: Configuration) -> Call[Plan]:
    """POST /v1/estimates."""
    return Call(
        "POST", "/v1/estimates", lambda answer: Plan.model_validate_json(answer.body, extra="ignore"),
        content=body(config=plain_config(config)))


def pools() -> Call[Pools]:
    """GET /v1/pools."""
    return Call("GET", "/v1/pools", document(Pools))


def prices() -> Call[PriceBook]:
    """GET /v1/prices."""
    return Call("GET", "/v1/prices", document(PriceBook))


def set_price(resource: str, dollars_per_hour: float, since: float | None) -> Call[None]:
    """PUT /v1/prices."""
    return Call("PUT", "/v1/prices", nothing, content=body(resource=resource, dollars_per_hour=dollars_per_hour, since=since))


def tokens() -> Call[TokenPage]:
    """GET /v1/tokens."""
    return Call("GET", "/v1/tokens", document(TokenPage))


def create_token(name: str, owner: str, scopes: Sequence[Scope], expires_in_days: float | None) -> Call[NewToken]:
    """POST /v1/tokens."""
    # Null is a value here: a token that does not expire.
    request = {"name": name, "owner": owner, "scopes": list(scopes), "expires_in_days": expires_in_days}
    return Call("POST", "/v1/tokens", document(NewToken), content=json.dumps(request).encode())


def revoke_token(token_id: str) -> Call[None]:
    """DELETE /v1/tokens/{id}."""
    return Call("DELETE", f"/v1/tokens/{segment(token_id)}", nothing)


def webhooks() -> Call[WebhookPage]:
    """GET /v1/webhooks."""
    return Call("GET", "/v1/webhooks", document(WebhookPage))


def create_webhook(url: str, states: Sequence[RunState]) -> Call[NewWebhook]:
    """POST /v1/webhooks."""
    return Call("POST", "/v1/webhooks", document(NewWebhook), content=body(url=url, states=list(states)))


def delete_webhook(webhook_id: str) -> Call[None]:
    """DELETE /v1/webhooks/{id}."""
    return Call("DELETE", f"/v1/webhooks/{segment(webhook_id)}", nothing)


def deliveries(webhook_id: str) -> Call[DeliveryPage]:
    """GET /v1/webhooks/{id}/deliveries."""
    return Call("GET", f"/v1/webhooks/{segment(webhook_id)}/deliveries", document(DeliveryPage))
