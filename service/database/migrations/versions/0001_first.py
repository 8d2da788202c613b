"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ULID = sa.String(26)
WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _runs()
    _what_runs_say()
    _callers()
    _webhooks()


def downgrade() -> None:
    for table in (
        "deliveries",
        "webhooks",
        "idempotency_keys",
        "tokens",
        "audit",
        "prices",
        "points",
        "units",
        "events",
        "runs",
    ):
        op.drop_table(table)


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", ULID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("priority", WHOLE, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("version", WHOLE, nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("attempt", WHOLE, nullable=False),
        sa.Column("futile", WHOLE, nullable=False),
        sa.Column("mark", WHOLE, nullable=False),
        sa.Column("mark_at_start", WHOLE, nullable=False),
        sa.Column("stop", sa.String(16)),
        sa.Column("budget_dollars", sa.Float()),
        sa.Column("dollars", sa.Float(), nullable=False),
        sa.Column("worker_seconds", sa.JSON(), nullable=False),
        sa.Column("meter", sa.JSON(), nullable=False),
        sa.Column("estimate", sa.JSON(), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("parent", ULID),
        sa.Column("next_position", WHOLE, nullable=False),
        sa.Column("next_seq", WHOLE, nullable=False),
        sa.Column("token_hash", sa.LargeBinary(32)),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("queued", sa.Float(), nullable=False),
        sa.Column("started", sa.Float()),
        sa.Column("ended", sa.Float()),
        sa.Column("updated", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="runs_key"),
    )
    op.create_index("runs_by_state", "runs", ["state", "priority", "queued"])
    op.create_index("runs_by_owner", "runs", ["owner", "id"])


def _what_runs_say() -> None:
    op.create_table(
        "events",
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("position", WHOLE, autoincrement=False, nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("stage", sa.String(32)),
        sa.Column("unit", sa.String(64)),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "position", name="events_key"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="events_run_id_known", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "units",
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("unit", sa.String(64), nullable=False),
        sa.Column("stage", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("step", WHOLE, nullable=False),
        sa.Column("steps", WHOLE, nullable=False),
        sa.Column("tokens", WHOLE, nullable=False),
        sa.Column("loss", sa.Float()),
        sa.Column("tokens_per_second", sa.Float()),
        sa.Column("restarts", WHOLE, nullable=False),
        sa.Column("workers", WHOLE, nullable=False),
        sa.Column("node", sa.Text()),
        sa.Column("started", sa.Float()),
        sa.Column("ended", sa.Float()),
        sa.PrimaryKeyConstraint("run_id", "unit", name="units_key"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="units_run_id_known", ondelete="CASCADE"),
    )
    op.create_table(
        "points",
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("unit", sa.String(64), nullable=False),
        sa.Column("step", WHOLE, autoincrement=False, nullable=False),
        sa.Column("tokens", WHOLE, nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("loss", sa.Float()),
        sa.Column("lr", sa.Float()),
        sa.Column("grad_norm", sa.Float()),
        sa.Column("tokens_per_second", sa.Float()),
        sa.PrimaryKeyConstraint("run_id", "unit", "step", name="points_key"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="points_run_id_known", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "prices",
        sa.Column("resource", sa.String(64), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("dollars_per_hour", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("resource", "since", name="prices_key"),
    )


def _callers() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", ULID, nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float()),
        sa.Column("revoked", sa.Float()),
        sa.Column("used", sa.Float()),
        sa.PrimaryKeyConstraint("id", name="tokens_key"),
        sa.UniqueConstraint("hash", name="tokens_hash_unique"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("body_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name="idempotency_keys_key"),
    )
    op.create_table(
        "audit",
        sa.Column("id", ULID, nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("token_id", ULID),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("address", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="audit_key"),
    )


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", ULID, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("states", sa.JSON(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="webhooks_key"),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", ULID, nullable=False),
        sa.Column("webhook_id", ULID, nullable=False),
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("attempts", WHOLE, nullable=False),
        sa.Column("due", sa.Float()),
        sa.Column("delivered", sa.Float()),
        sa.Column("answer", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="deliveries_key"),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name="deliveries_webhook_id_known", ondelete="CASCADE"
        ),
    )
    op.create_index("deliveries_by_due", "deliveries", ["due"])
    op.create_index("deliveries_by_webhook", "deliveries", ["webhook_id", "id"])
