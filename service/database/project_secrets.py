"""Secrets of projects: sealed when they are set, and read only for the driver of a run."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.sealed import seal, unseal
from service.database import values
from service.database.access_tables import Project, ProjectSecret
from service.database.session import lock_until_commit
from service.database.tables import RunRow
from service.errors import Conflict

MOST = 100
"""Maximum number of secrets of a project."""


def put(session: Session, key: bytes, project_id: str, name: str, value: str, *, by: str, now: float) -> ProjectSecret:
    """Set a secret.

    Args:
        session: Writing transaction.
        key: Key of all secrets of the service.
        project_id: The project.
        name: Name of the secret.
        value: Its new value.
        by: Owner of the token that sets it.
        now: Seconds since the epoch.

    Raises:
        Conflict: The project has `MOST` secrets.
    """
    lock_until_commit(session, "project secrets", project_id)
    row = session.get(ProjectSecret, (project_id, name))
    if row is None:
        if len(page(session, project_id)) >= MOST:
            raise Conflict(f"the project has {MOST} secrets, and there may be no more")
        row = ProjectSecret(project_id=project_id, name=name)
        session.add(row)
    row.sealed, row.set_by, row.updated = seal(key, _place(project_id, name), value), values.text(by), now
    session.flush()
    return row


def page(session: Session, project_id: str) -> Sequence[ProjectSecret]:
    """The secrets of a project, by name."""
    query = select(ProjectSecret).where(ProjectSecret.project_id == project_id).order_by(ProjectSecret.name)
    return session.scalars(query).all()


def remove(session: Session, project_id: str, name: str) -> bool:
    """Delete a secret; False if there is none of this name."""
    removed = delete(ProjectSecret).where(ProjectSecret.project_id == project_id, ProjectSecret.name == name)
    return session.scalar(removed.returning(ProjectSecret.name)) is not None


def check(session: Session, names: Sequence[str], project_id: str, owner: str) -> None:
    """Check that a run in a project has the secrets that it names.

    Raises:
        ConfigError: Neither the project nor the owner's default project has a secret of this name.
    """
    known = _usable(session, project_id, owner)
    for name in names:
        if name not in known:
            raise ConfigError("secrets", name, _REMEDY)


def for_driver(session: Session, key: bytes, run: RunRow) -> dict[str, str]:
    """Values of the secrets that a run names, by name.

    Raises:
        Conflict: There is no such secret any more, or it was sealed with another key.
    """
    known = _usable(session, run.project, run.owner)
    return {name: _value(key, name, known.get(name)) for name in run.settings.secrets}


_REMEDY = "neither the run's project nor yours has it; set it first: `moedisco secrets set NAME [--project PROJECT]`"


def _value(key: bytes, name: str, row: ProjectSecret | None) -> str:
    if row is None:
        raise Conflict(f"{name}: {_REMEDY}")
    try:
        return unseal(key, _place(row.project_id, name), row.sealed)
    except ValueError as error:
        raise Conflict(
            f"{name}: the secret was set under another --secrets-key-file; set it again, or start the service with "
            "that file"
        ) from error


def _usable(session: Session, project_id: str, owner: str) -> dict[str, ProjectSecret]:
    """Secrets by name of a project and, where it has none of the name, of an owner's default project."""
    default = select(Project.id).where(Project.owner == owner, Project.name == owner)
    found = [row for each in session.scalars(default) for row in page(session, each)]
    return {row.name: row for row in (*found, *page(session, project_id))}


def _place(project_id: str, name: str) -> str:
    return f"secret {name} of project {project_id}"
