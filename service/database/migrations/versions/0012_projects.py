"""Add projects: every run gets into its owner's default project, whose members are the owner alone."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from alembic import op

from service.database.ids import new_id

revision = "0012"
down_revision = "0011"
ULID = sa.String(26)
FIGURES = (
    *("owner", "id", "created", "name", "state", "perplexity", "bits_per_byte", "held_out_loss"),
    *("active_parameters", "tokens", "hours"),
)

PROJECTS = sa.table("projects", *map(sa.column, ("id", "owner", "name", "created")))
RUNS = sa.table("runs", *map(sa.column, ("id", "owner", "project")))
OFFERS = sa.table("offers", *map(sa.column, ("donor_owner", "donor_project")))
TOKENS = sa.table("tokens", sa.column("owner"))


def upgrade() -> None:
    """Create the tables, and a project for each owner of a run or token."""
    op.create_table(
        "projects",
        sa.Column("id", ULID, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="projects_key"),
        sa.UniqueConstraint("owner", "name", name="projects_owner_unique"),
    )
    op.create_table(
        "members",
        sa.Column("project_id", ULID, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="members_project_id_known", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project_id", "name", name="members_key"),
    )
    op.create_index("members_by_name", "members", ["name", "project_id"])
    # A new foreign key would need a new table of runs in SQLite, whose removal of the old one deletes their events.
    op.add_column("runs", sa.Column("project", ULID, nullable=False, server_default=""))
    op.add_column("offers", sa.Column("donor_project", ULID, nullable=False, server_default=""))
    connection = op.get_bind()
    owners = sa.union(sa.select(RUNS.c.owner), sa.select(OFFERS.c.donor_owner), sa.select(TOKENS.c.owner))
    now = time.time()
    rows = [{"id": new_id(), "owner": owner, "name": owner, "created": now} for owner in connection.scalars(owners)]
    if rows:
        connection.execute(sa.insert(PROJECTS), rows)
    connection.execute(sa.update(RUNS).values(project=_project_of(RUNS.c.owner)))
    connection.execute(sa.update(OFFERS).values(donor_project=_project_of(OFFERS.c.donor_owner)))
    op.drop_column("offers", "donor_owner")
    op.drop_index("runs_by_figures", "runs")
    op.create_index("runs_by_figures", "runs", ["project", *FIGURES])


def downgrade() -> None:
    """Drop the tables; only its owner and administrators see a run."""
    op.add_column("offers", sa.Column("donor_owner", sa.Text(), nullable=False, server_default=""))
    owner = sa.select(PROJECTS.c.owner).where(PROJECTS.c.id == OFFERS.c.donor_project).scalar_subquery()
    op.get_bind().execute(sa.update(OFFERS).values(donor_owner=sa.func.coalesce(owner, "")))
    op.drop_column("offers", "donor_project")
    op.drop_index("runs_by_figures", "runs")
    op.drop_column("runs", "project")
    op.create_index("runs_by_figures", "runs", list(FIGURES))
    op.drop_table("members")
    op.drop_table("projects")


def _project_of(owner: Any) -> Any:
    return sa.select(PROJECTS.c.id).where(PROJECTS.c.owner == owner).scalar_subquery()
