"""Between calls and httpx."""

from __future__ import annotations

import uuid
from typing import Any

import httpx

from service.client.address import Address
from service.client.calls import Answer, Call

CONTENT = frozenset({200, 206})
"""Statuses whose body is what was asked for."""
_CONNECT_SECONDS = 10.0


def headers(address: Address) -> dict[str, str]:
    """What every request carries."""
    return {"Authorization": f"Bearer {address.token}"} if address.token else {}


def request(call: Call[Any]) -> dict[str, Any]:
    """A call as `httpx.Client.stream` takes it."""
    json = (("Content-Type", "application/json"),) if call.content is not None else ()
    return {
        "method": call.method, "url": call.path, "params": call.params, "headers": [*call.headers, *json],
        "content": call.content, "timeout": httpx.Timeout(call.silence, connect=_CONNECT_SECONDS)}


def answer(response: httpx.Response, body: bytes = b"") -> Answer:
    """What came, without httpx."""
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()}, body)


def new_key() -> str:
    """An idempotency key."""
    return uuid.uuid4().hex
