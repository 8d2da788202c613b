"""Browser sessions and the one-time codes that start them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

ULID = sa.String(26)


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", ULID, nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("token_id", ULID, nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("used", sa.Float(), nullable=False),
        sa.Column("ends", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="sessions_key"),
        sa.UniqueConstraint("hash", name="sessions_hash_unique"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="sessions_token_id_known", ondelete="CASCADE"),
    )
    op.create_index("sessions_by_token", "sessions", ["token_id", "id"])
    op.create_table(
        "sign_in_codes",
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("token_id", ULID, nullable=False),
        sa.Column("ends", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("hash", name="sign_in_codes_key"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="sign_in_codes_token_id_known", ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("sign_in_codes")
    op.drop_table("sessions")
