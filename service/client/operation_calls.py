"""Calls about what runs run on, and about who may ask."""

from __future__ import annotations

import json
from collections.abc import Sequence

from service.client.calls import Call, body, query, segment
from service.client.parsing import document, nothing
from service.client.run_calls import Configuration, plain_config
from service.domain.policies import Policies, Policy
from service.domain.states import RunState
from service.schemas import (
    DeliveryPage,
    Estimate,
    Identity,
    NewSignInCode,
    NewToken,
    NewWebhook,
    PoolList,
    Quota,
    Scope,
    TokenPage,
    WebhookPage,
)


def identity() -> Call[Identity]:
    """GET /v1/identity."""
    return Call("GET", "/v1/identity", document(Identity))


def estimate(config: Configuration) -> Call[Estimate]:
    """POST /v1/estimates."""
    return Call(
        "POST", "/v1/estimates", lambda answer: Estimate.model_validate_json(answer.body, extra="ignore"),
        content=body(config=plain_config(config)))


def pools() -> Call[PoolList]:
    """GET /v1/pools."""
    return Call("GET", "/v1/pools", document(PoolList))


def quota(owner: str | None) -> Call[Quota]:
    """GET /v1/quota."""
    return Call("GET", "/v1/quota", document(Quota), query(owner=owner))


def policies() -> Call[Policies]:
    """GET /v1/policies."""
    return Call("GET", "/v1/policies", lambda answer: Policies.model_validate_json(answer.body, extra="ignore"))


def set_policies(wanted: Policies) -> Call[None]:
    """PUT /v1/policies."""
    return Call("PUT", "/v1/policies", nothing, content=_as_set(wanted))


def set_policy(owner: str, wanted: Policy) -> Call[None]:
    """PUT /v1/policies/owners/{owner}."""
    return Call("PUT", f"/v1/policies/owners/{segment(owner)}", nothing, content=_as_set(wanted))


def delete_policy(owner: str) -> Call[None]:
    """DELETE /v1/policies/owners/{owner}."""
    return Call("DELETE", f"/v1/policies/owners/{segment(owner)}", nothing)


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


def create_sign_in_code() -> Call[NewSignInCode]:
    """POST /v1/sign-in-codes."""
    return Call("POST", "/v1/sign-in-codes", document(NewSignInCode))


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


def _as_set(wanted: Policies | Policy) -> bytes:
    # Null is a value here, no limit, and what an entry leaves out is as in the default.
    return wanted.model_dump_json(exclude_unset=True).encode()
