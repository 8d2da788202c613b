"""Tokens, browser sessions and the audit log."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from service.domain.policies import Owner
from service.schemas.base import DisplayName, Document, Scope, example


class TokenRequest(Document):
    """A token to create."""

    model_config = example(name="ci", owner="ann", scopes=["submit"], expires_in_days=90)

    name: DisplayName
    owner: Owner | None = None
    """Owner that the token acts for; by default the caller. Only administrators may name another owner."""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)]
    expires_in_days: Annotated[float, Field(gt=0, le=3650)] | None = 90
    """Days for which the token is valid; with null it never expires, which only administrators may request."""


class TokenInfo(Document):
    """A token without its secret."""

    id: str
    name: str
    owner: str
    scopes: list[Scope]
    created: float
    expires: float | None
    revoked: float | None
    used: float | None


class NewToken(TokenInfo):
    """A token with its secret, which is shown only once."""

    token: str


class TokenPage(Document):
    """Tokens, oldest first."""

    items: list[TokenInfo]
    next_cursor: str | None
    """`cursor` of the next page; null on the last one."""


class SessionRequest(Document):
    """A token or a sign-in code with which a browser signs in."""

    model_config = example(token="mdk_...")  # noqa: S106 - none

    token: Annotated[str, Field(max_length=256)] | None = None
    code: Annotated[str, Field(max_length=256)] | None = None
    """Code from POST /v1/sign-in-codes."""

    @model_validator(mode="after")
    def _one(self) -> SessionRequest:
        if (self.token is None) == (self.code is None):
            raise ValueError("give either a token or a code")
        return self


class SessionInfo(Document):
    """A session of a signed-in browser."""

    id: str
    created: float
    used: float
    """Time of the last use, to the minute."""
    ends: float
    """Latest time at which the session ends, even if it is in use."""
    current: bool
    """Whether this request used the session."""


class SessionPage(Document):
    """Sessions, newest first."""

    items: list[SessionInfo]


class NewSignInCode(Document):
    """A code that signs in one browser; it is shown only once."""

    code: str
    expires: float


class Identity(Document):
    """The authenticated caller, its rights, and the service's version."""

    owner: str
    scopes: list[Scope]
    version: str
    """Version of the service."""
    dashboard_url: str | None
    """Path of the Ray dashboard on this service; null if the caller is not an administrator."""


class AuditEntry(Document):
    """An entry of the audit log."""

    id: str
    time: float
    owner: str
    action: str
    target: str
    detail: dict[str, Any]
    address: str | None


class AuditPage(Document):
    """Entries of the audit log, newest first."""

    items: list[AuditEntry]
    next_cursor: str | None
    """`cursor` of the next page; null on the last one."""
