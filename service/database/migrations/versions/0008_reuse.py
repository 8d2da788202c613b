"""Runs that a retry may take stages from, and files that several runs share."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
ULID = sa.String(26)
WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "offers",
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("number", WHOLE, autoincrement=False, nullable=False),
        sa.Column("donor", ULID, nullable=False),
        sa.Column("donor_owner", sa.Text(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("stages", sa.JSON(), nullable=False),
        sa.Column("taken", sa.Float()),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="offers_run_id_known", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "number", name="offers_key"),
    )
    op.create_index("offers_by_donor", "offers", ["donor", "taken"])
    op.create_table(
        "shares",
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("folder", sa.String(64), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("bytes", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="shares_run_id_known", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "folder", name="shares_key"),
    )
    op.create_index("shares_by_key", "shares", ["key", "run_id"])


def downgrade() -> None:
    """Drop the tables; runs take no more stages from others, and shared files count for each run that has them."""
    op.drop_table("shares")
    op.drop_table("offers")
