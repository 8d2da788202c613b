"""Held-out losses and the load of experts during training."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

ULID = sa.String(26)


def upgrade() -> None:
    op.add_column("points", sa.Column("largest_load", sa.Float()))
    op.add_column("points", sa.Column("dead_experts", sa.BigInteger().with_variant(sa.Integer, "sqlite")))
    op.create_table(
        "held_out",
        sa.Column("run_id", ULID, nullable=False),
        sa.Column("unit", sa.String(64), nullable=False),
        sa.Column("step", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=False, nullable=False),
        sa.Column("tokens", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("held_out_loss", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "unit", "step", name="held_out_key"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="held_out_run_id_known", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("held_out")
    op.drop_column("points", "dead_experts")
    op.drop_column("points", "largest_load")
