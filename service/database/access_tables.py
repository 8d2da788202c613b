"""Tables of access and requests: tokens, sessions, projects, policies, spending, the audit log."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, Index, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.database.table import ULID, Table


class Token(Table):
    """A bearer token, stored as its hash."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    hash: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    """SHA-256 of the token; no slow hash is needed for 256 random bits."""
    name: Mapped[str]
    owner: Mapped[str]
    scopes: Mapped[list[str]]
    created: Mapped[float]
    expires: Mapped[float | None]
    revoked: Mapped[float | None]
    used: Mapped[float | None]


class BrowserSession(Table):
    """A browser session, stored as the hash of its secret."""

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    hash: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    """SHA-256 of a random 256-bit secret."""
    token_id: Mapped[str] = mapped_column(ULID, ForeignKey("tokens.id", ondelete="CASCADE"))
    """Token whose permissions the session has; the session ends when the token does."""
    created: Mapped[float]
    used: Mapped[float]
    """Time of the last use, to the minute; a session that is unused for too long ends."""
    ends: Mapped[float]
    """Latest time at which the session ends, even if it is in use."""

    __table_args__ = (Index("sessions_by_token", "token_id", "id"),)


class SignInCode(Table):
    """A code that starts one session, stored as its hash; a used code is deleted."""

    __tablename__ = "sign_in_codes"

    hash: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    token_id: Mapped[str] = mapped_column(ULID, ForeignKey("tokens.id", ondelete="CASCADE"))
    ends: Mapped[float]


class Project(Table):
    """Runs that the same people may see and change."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    owner: Mapped[str]
    name: Mapped[str]
    """Name among the owner's projects; the default project has the owner's name."""
    created: Mapped[float]

    __table_args__ = (UniqueConstraint("owner", "name"),)


class Member(Table):
    """A person, not the owner, who may see a project's runs."""

    __tablename__ = "members"

    project_id: Mapped[str] = mapped_column(ULID, ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Owner that the person's tokens act for."""
    role: Mapped[str] = mapped_column(String(16))
    """`viewer` or `editor`."""

    __table_args__ = (Index("members_by_name", "name", "project_id"),)


class ProjectSecret(Table):
    """A secret that the drivers of a project's runs may get, sealed with a key that is not in the database."""

    __tablename__ = "project_secrets"

    project_id: Mapped[str] = mapped_column(ULID, ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    sealed: Mapped[str]
    """The value; see `moedisco_ray.core.sealed`."""
    set_by: Mapped[str]
    """Owner whose token set the value last."""
    updated: Mapped[float]


class NoticeUrl(Table):
    """The URL that gets notices about the ends of a project's runs, sealed like its secrets."""

    __tablename__ = "notice_urls"

    project_id: Mapped[str] = mapped_column(ULID, ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True)
    sealed: Mapped[str]
    shown: Mapped[str]
    """The part of the URL that may be shown."""
    set_by: Mapped[str]
    updated: Mapped[float]
    sent: Mapped[float | None]
    """Time of the last notice that was accepted."""
    failure: Mapped[str | None]
    """Why the last notice was not accepted; null if it was."""


class IdempotencyKey(Table):
    """A used idempotency key, with the run that a repeated request gets."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(128), primary_key=True)
    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    body_hash: Mapped[bytes] = mapped_column(LargeBinary(32))
    run_id: Mapped[str] = mapped_column(ULID)
    created: Mapped[float]


class OwnerPolicy(Table):
    """The policy of one owner, or the default policy."""

    __tablename__ = "policies"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Owner that the policy applies to; `*` for the default policy."""
    limits: Mapped[dict[str, Any]]
    """Fields of `Policy` that were set."""
    updated: Mapped[float]


class Spending(Table):
    """Dollars metered for an owner's runs in a project in a calendar month (UTC), including deleted runs."""

    __tablename__ = "metered"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(ULID, primary_key=True)
    """Id of the project to which the run belonged at that time."""
    month: Mapped[str] = mapped_column(String(7), primary_key=True)
    """Month, such as `2026-11`."""
    dollars: Mapped[float]


class Audit(Table):
    """An entry of the audit log."""

    __tablename__ = "audit"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    time: Mapped[float]
    owner: Mapped[str]
    token_id: Mapped[str | None] = mapped_column(ULID)
    action: Mapped[str]
    """Action, such as `run.submit`, `run.cancel` or `token.create`."""
    target: Mapped[str]
    detail: Mapped[dict[str, Any]]
    address: Mapped[str | None]
