"""Drop webhooks and their deliveries: the operator's URL gets one message about the end of each run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
ULID = sa.String(26)
WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Drop the tables, and add the column; about runs that have ended already, no message is sent."""
    op.drop_table("deliveries")
    op.drop_table("webhooks")
    op.add_column("runs", sa.Column("end_posted", sa.Float()))
    op.execute("UPDATE runs SET end_posted = ended")
    op.create_index("runs_by_end", "runs", ["end_posted", "ended"])


def downgrade() -> None:
    """Add the tables without rows, and drop the column."""
    op.drop_index("runs_by_end", "runs")
    op.drop_column("runs", "end_posted")
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
