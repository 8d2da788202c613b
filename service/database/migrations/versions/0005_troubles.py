"""Why the service cannot process a run. Documents without a version, stored before this revision, are not converted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("runs", sa.Column("trouble", sa.Text()))


def downgrade() -> None:
    op.drop_column("runs", "trouble")
