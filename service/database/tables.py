"""The tables. Times are seconds since the epoch (UTC); ids are ULIDs, which sort by time of creation."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Text, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from moedisco_ray.core.config import Pools, RunConfig
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.renamed import stored_config
from service.errors import UnusableRun

ULID = String(26)
Position = BigInteger().with_variant(Integer, "sqlite")


class Table(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention={
        # Migrations must be able to name what they change.
        "ix": "%(table_name)s_by_%(column_0_name)s", "uq": "%(table_name)s_%(column_0_name)s_unique",
        "fk": "%(table_name)s_%(column_0_name)s_known", "pk": "%(table_name)s_key"})
    type_annotation_map = {str: Text, float: Float, int: Position, dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 - SQLAlchemy's own form


class RunRow(Table):
    """A training request and where it stands."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    name: Mapped[str]
    owner: Mapped[str]
    tags: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(default=0)
    """Higher goes first."""
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None]
    """Why it is in this state: what it waits for, why it failed."""
    version: Mapped[int] = mapped_column(default=1)
    """Counts changes; a writer that read an older one is refused."""
    config: Mapped[dict[str, Any]]
    """Resolved; `output` and `name` place the run directory."""
    directory: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    """Drivers started so far; 0: none yet."""
    futile: Mapped[int] = mapped_column(default=0)
    """Drivers lost in a row that got no further than the one before."""
    mark: Mapped[int] = mapped_column(default=0)
    """Stages finished and steps made, as a number that only grows; what `futile` is judged by."""
    mark_at_start: Mapped[int] = mapped_column(default=0)
    """`mark` when the present attempt began."""
    stop: Mapped[str | None] = mapped_column(String(16))
    """Why it was asked to end: `cancelled`, `killed`, `budget` or `month`."""
    budget_dollars: Mapped[float | None]
    dollars: Mapped[float] = mapped_column(default=0.0)
    """Metered so far, every attempt included."""
    worker_seconds: Mapped[dict[str, Any]]
    """Per pool."""
    meter: Mapped[dict[str, Any]]
    """State of the fold over the events; see `moedisco_ray.core.metering`."""
    estimate: Mapped[dict[str, Any]]
    """What `POST /v1/estimates` said when it was submitted."""
    progress: Mapped[dict[str, Any]]
    """{stages: {name: {status, started, seconds}}, current, reached: {stages, steps}, ended: {type, time, message or reason}};
    `ended`, the driver's last word, is there from then until the next one begins."""
    parent: Mapped[str | None] = mapped_column(ULID)
    """The run it is a retry of."""
    notes: Mapped[list[str] | None]
    """Remarks on how it was taken, such as prices that were replaced; null in runs of an earlier version."""
    kept: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Retention does not remove it."""
    expires_at: Mapped[float | None]
    """When retention removes it, as announced; null: not announced."""
    disk_bytes: Mapped[int | None]
    """Size of its directory when it was last measured."""
    measured: Mapped[float | None]
    """When that was."""
    next_position: Mapped[int] = mapped_column(default=0)
    """Of the next event in the run's stream."""
    next_seq: Mapped[int] = mapped_column(default=0)
    """Of the next line of the driver's `events.jsonl`."""
    token_hash: Mapped[bytes | None] = mapped_column(LargeBinary(32))
    """Of the token that the run's driver reports with; renewed per attempt."""
    created: Mapped[float]
    queued: Mapped[float]
    started: Mapped[float | None]
    ended: Mapped[float | None]
    updated: Mapped[float]

    __table_args__ = (
        Index("runs_by_state", "state", "priority", "queued"),
        Index("runs_by_owner", "owner", "id"),
        # Summed every second: from the index alone, since a row holds long documents.
        Index("runs_by_size", "owner", "disk_bytes"),
    )

    @property
    def settings(self) -> RunConfig:
        """Its configuration.

        Raises:
            UnusableRun: It was stored by another version of the software, and this one refuses it.
        """
        try:
            return stored_config(self.config)
        except ValidationError as error:
            raise _unusable(error) from error

    @property
    def pools(self) -> Pools:
        """The pools of its configuration.

        Raises:
            UnusableRun: As `settings`.
        """
        try:
            return Pools.model_validate(self.config.get("pools", {}))
        except ValidationError as error:
            raise _unusable(error) from error


def _unusable(error: ValidationError) -> UnusableRun:
    return UnusableRun(
        f"its stored configuration cannot be used by this version: {first_mistake(error.errors())}; submit it again with a "
        "configuration of today")


class EventRow(Table):
    """One element of a run's stream: the driver's events and the service's own, in one order."""

    __tablename__ = "events"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """From 0, without gaps: the SSE id."""
    time: Mapped[float]
    type: Mapped[str] = mapped_column(String(32))
    """The driver's event types, and `state`: {state, reason, attempt}."""
    stage: Mapped[str | None] = mapped_column(String(32))
    unit: Mapped[str | None] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]

    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012 - SQLAlchemy's own form; rows lie in the order they are read


class UnitRow(Table):
    """A part of a stage with its own progress: the seed, a sub-model, the fine-tune."""

    __tablename__ = "units"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    unit: Mapped[str] = mapped_column(String(64), primary_key=True)
    stage: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    """`running`, `restarting`, `done`."""
    step: Mapped[int] = mapped_column(default=0)
    steps: Mapped[int] = mapped_column(default=0)
    tokens: Mapped[int] = mapped_column(default=0)
    loss: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    restarts: Mapped[int] = mapped_column(default=0)
    workers: Mapped[int] = mapped_column(default=1)
    node: Mapped[str | None]
    started: Mapped[float | None]
    ended: Mapped[float | None]


class Point(Table):
    """One progress report of a unit; a step that is trained again after a restart replaces what was reported from there on."""

    __tablename__ = "points"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    unit: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tokens: Mapped[int]
    time: Mapped[float]
    loss: Mapped[float | None]
    lr: Mapped[float | None]
    grad_norm: Mapped[float | None]
    tokens_per_second: Mapped[float | None]

    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012 - as above


class Token(Table):
    """A bearer token, by its hash."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    hash: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    """SHA-256 of a random 256-bit token: nothing slower is needed against guessing."""
    name: Mapped[str]
    owner: Mapped[str]
    scopes: Mapped[list[str]]
    created: Mapped[float]
    expires: Mapped[float | None]
    revoked: Mapped[float | None]
    used: Mapped[float | None]


class BrowserSession(Table):
    """A browser that is signed in, by the hash of its cookie."""

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    hash: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    """SHA-256 of a random 256-bit value."""
    token_id: Mapped[str] = mapped_column(ULID, ForeignKey("tokens.id", ondelete="CASCADE"))
    """The token that it acts for, and ends with."""
    created: Mapped[float]
    used: Mapped[float]
    """Time of the last use, to the minute; without use for too long, the session is over."""
    ends: Mapped[float]
    """Time at which it is over, however much it is used."""

    __table_args__ = (Index("sessions_by_token", "token_id", "id"),)


class SignInCode(Table):
    """A code that begins one session, by its hash; used ones are deleted."""

    __tablename__ = "sign_in_codes"

    hash: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    token_id: Mapped[str] = mapped_column(ULID, ForeignKey("tokens.id", ondelete="CASCADE"))
    ends: Mapped[float]


class IdempotencyKey(Table):
    """An answer that a repeated `POST /v1/runs` gets again."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(128), primary_key=True)
    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    body_hash: Mapped[bytes] = mapped_column(LargeBinary(32))
    run_id: Mapped[str] = mapped_column(ULID)
    created: Mapped[float]


class Webhook(Table):
    """Somebody to tell of state changes."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    owner: Mapped[str]
    url: Mapped[str]
    secret: Mapped[str]
    """Signs deliveries; kept readable, since it must be used."""
    states: Mapped[list[str]]
    """States to tell of; empty: all."""
    created: Mapped[float]


class Delivery(Table):
    """One message to one webhook, written in the transaction of the state change it tells of."""

    __tablename__ = "deliveries"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ULID, ForeignKey("webhooks.id", ondelete="CASCADE"))
    run_id: Mapped[str] = mapped_column(ULID)
    body: Mapped[dict[str, Any]]
    created: Mapped[float]
    attempts: Mapped[int] = mapped_column(default=0)
    due: Mapped[float | None]
    """When to try next; null: delivered or given up."""
    delivered: Mapped[float | None]
    answer: Mapped[str | None]
    """Status or error of the last attempt."""

    __table_args__ = (Index("deliveries_by_due", "due"), Index("deliveries_by_webhook", "webhook_id", "id"))


class OwnerPolicy(Table):
    """An entry of the policies: the default's, or an owner's."""

    __tablename__ = "policies"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    """`*` is the default."""
    limits: Mapped[dict[str, Any]]
    """Fields of `service.domain.policies.Policy` that were set."""
    updated: Mapped[float]


class Spending(Table):
    """Metered dollars of an owner in a calendar month (UTC); deleting a run does not change them."""

    __tablename__ = "spending"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    month: Mapped[str] = mapped_column(String(7), primary_key=True)
    """Such as 2026-11."""
    dollars: Mapped[float]


class Audit(Table):
    """Who did what."""

    __tablename__ = "audit"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    time: Mapped[float]
    owner: Mapped[str]
    token_id: Mapped[str | None] = mapped_column(ULID)
    action: Mapped[str]
    """`run.submit`, `run.cancel`, `token.create`, ..."""
    target: Mapped[str]
    detail: Mapped[dict[str, Any]]
    address: Mapped[str | None]
