"""Drop the hashes of drivers' tokens: a driver signs with a key that the service derives from its own secret."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.drop_column("runs", "token_hash")


def downgrade() -> None:
    """Add the column without values; drivers that run have to be started again."""
    op.add_column("runs", sa.Column("token_hash", sa.LargeBinary(32)))
