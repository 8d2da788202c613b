"""Meter dollars by project; what was spent before counts for the owners' own projects."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
ULID = sa.String(26)

OLD = sa.table("spending", *map(sa.column, ("owner", "month", "dollars")))
NEW = sa.table("metered", *map(sa.column, ("owner", "project", "month", "dollars")))
PROJECTS = sa.table("projects", *map(sa.column, ("id", "owner", "name")))


def upgrade() -> None:
    """Make a new table of the old one."""
    op.create_table(
        "metered",
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("project", ULID, nullable=False),
        sa.Column("month", sa.String(7), nullable=False),
        sa.Column("dollars", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "project", "month", name="metered_key"),
    )
    own = sa.select(PROJECTS.c.id).where(PROJECTS.c.owner == OLD.c.owner, PROJECTS.c.name == OLD.c.owner)
    rows = sa.select(OLD.c.owner, sa.func.coalesce(own.scalar_subquery(), ""), OLD.c.month, OLD.c.dollars)
    op.get_bind().execute(sa.insert(NEW).from_select(["owner", "project", "month", "dollars"], rows))
    op.drop_table("spending")


def downgrade() -> None:
    """Make the old table of the new one."""
    op.create_table(
        "spending",
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("month", sa.String(7), nullable=False),
        sa.Column("dollars", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "month", name="spending_key"),
    )
    rows = sa.select(NEW.c.owner, NEW.c.month, sa.func.sum(NEW.c.dollars)).group_by(NEW.c.owner, NEW.c.month)
    op.get_bind().execute(sa.insert(OLD).from_select(["owner", "month", "dollars"], rows))
    op.drop_table("metered")
