"""Add URLs of projects that get notices about ends of runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Create the table, and a column for the time of a run's notice."""
    op.create_table(
        "notice_urls",
        sa.Column("project_id", sa.String(26), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("shown", sa.Text(), nullable=False),
        sa.Column("set_by", sa.Text(), nullable=False),
        sa.Column("updated", sa.Float(), nullable=False),
        sa.Column("sent", sa.Float(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="notice_urls_project_id_known", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("project_id", name="notice_urls_key"),
    )
    op.add_column("runs", sa.Column("noticed", sa.Float(), nullable=True))
    op.create_index("runs_by_notice", "runs", ["noticed", "ended"])


def downgrade() -> None:
    """Drop both."""
    op.drop_index("runs_by_notice", "runs")
    op.drop_column("runs", "noticed")
    op.drop_table("notice_urls")
