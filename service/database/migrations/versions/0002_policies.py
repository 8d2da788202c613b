"""Policies of owners, their monthly spending, and retention of runs; the price book becomes part of the policies."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables and columns."""
    op.create_table(
        "policies",
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("updated", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name="policies_key"),
    )
    op.create_table(
        "spending",
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("month", sa.String(7), nullable=False),
        sa.Column("dollars", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "month", name="spending_key"),
    )
    # Do not use a batch, which copies the table on SQLite: dropping the old table would delete the events of every run.
    op.add_column("runs", sa.Column("notes", sa.JSON()))
    op.add_column("runs", sa.Column("kept", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("runs", sa.Column("expires_at", sa.Float()))
    op.add_column("runs", sa.Column("disk_bytes", WHOLE))
    op.add_column("runs", sa.Column("measured", sa.Float()))
    op.create_index("runs_by_size", "runs", ["owner", "disk_bytes"])
    _keep_prices()
    _keep_spending()
    op.drop_table("prices")


def _keep_prices() -> None:
    """Move the newest price of each resource to the default policy."""
    prices = sa.table("prices", sa.column("resource"), sa.column("since"), sa.column("dollars_per_hour"))
    rows = op.get_bind().execute(sa.select(prices.c.resource, prices.c.dollars_per_hour).order_by(prices.c.since)).all()
    newest = {row.resource: row.dollars_per_hour for row in rows}
    if newest:
        policies = sa.table("policies", sa.column("owner"), sa.column("limits", sa.JSON()), sa.column("updated"))
        op.execute(sa.insert(policies).values(owner="*", limits={"prices": newest}, updated=time.time()))


def _keep_spending() -> None:
    """Count the dollars of runs submitted in this month; when older runs spent theirs is unknown."""
    now = datetime.now(UTC)
    runs = sa.table("runs", sa.column("owner"), sa.column("dollars"), sa.column("created"))
    begin = datetime(now.year, now.month, 1, tzinfo=UTC).timestamp()
    spent = (
        sa.select(runs.c.owner, sa.literal(now.strftime("%Y-%m")), sa.func.sum(runs.c.dollars))
        .where(runs.c.created >= begin, runs.c.dollars > 0)
        .group_by(runs.c.owner)
    )
    spending = sa.table("spending", sa.column("owner"), sa.column("month"), sa.column("dollars"))
    op.execute(sa.insert(spending).from_select(["owner", "month", "dollars"], spent))


def downgrade() -> None:
    """Drop the tables and columns; the price book becomes empty."""
    op.create_table(
        "prices",
        sa.Column("resource", sa.String(64), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("dollars_per_hour", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("resource", "since", name="prices_key"),
    )
    op.drop_index("runs_by_size", "runs")
    for column in ("measured", "disk_bytes", "expires_at", "kept", "notes"):
        op.execute(f"ALTER TABLE runs DROP COLUMN {column}")
    op.drop_table("spending")
    op.drop_table("policies")
