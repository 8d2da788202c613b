"""Model FLOPs utilisation of units and of the points of their curves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = ("units", "points")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("mfu", sa.Float()))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "mfu")
