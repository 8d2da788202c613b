"""Add data sets, the list of their files, and the contents that owners have uploaded."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
ULID = sa.String(26)
WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", ULID, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("project", ULID, nullable=False),
        sa.Column("bytes", WHOLE, nullable=False),
        sa.Column("count", WHOLE, nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="datasets_key"),
        sa.UniqueConstraint("project", "name", "hash", name="datasets_project_unique"),
    )
    op.create_index("datasets_by_name", "datasets", ["name", "id"])
    op.create_index("datasets_by_hash", "datasets", ["hash"])
    op.create_table(
        "dataset_files",
        sa.Column("dataset_id", ULID, nullable=False),
        sa.Column("number", WHOLE, autoincrement=False, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("bytes", WHOLE, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["datasets.id"], name="dataset_files_dataset_id_known", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("dataset_id", "number", name="dataset_files_key"),
    )
    op.create_index("dataset_files_by_content", "dataset_files", ["sha256", "dataset_id"])
    op.create_table(
        "blobs",
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", WHOLE, nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "sha256", name="blobs_key"),
    )
    op.create_index("blobs_by_content", "blobs", ["sha256"])


def downgrade() -> None:
    """Drop the tables; the files of data sets remain on the disk."""
    op.drop_table("blobs")
    op.drop_table("dataset_files")
    op.drop_table("datasets")
