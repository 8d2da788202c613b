"""Add secrets of projects."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "project_secrets",
        sa.Column("project_id", sa.String(26), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("set_by", sa.Text(), nullable=False),
        sa.Column("updated", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="project_secrets_project_id_known", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("project_id", "name", name="project_secrets_key"),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("project_secrets")
