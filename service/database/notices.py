"""URLs of projects that get notices about ends of runs, and the runs whose notice was not sent yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from moedisco_ray.core.sealed import seal, unseal
from service.database import values
from service.database.access_tables import NoticeUrl, Project
from service.database.runs import LEFT_OUT
from service.database.tables import RunRow
from service.errors import Conflict


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A run whose notice was not sent yet.

    Attributes:
        url: URL of the run's project, or of its owner's default project.
        parent_loss: Held-out loss of the run that it retries, if that is in the same project.
    """

    run: RunRow
    url: NoticeUrl
    parent_loss: float | None


def get(session: Session, project_id: str) -> NoticeUrl | None:
    return session.get(NoticeUrl, project_id)


def put(session: Session, key: bytes, project_id: str, url: str, shown: str, *, by: str, now: float) -> NoticeUrl:
    """Set the URL of a project; runs that ended before get no notice.

    Args:
        session: Writing transaction.
        key: Key of all secrets of the service.
        project_id: The project.
        url: The URL.
        shown: The part of the URL that may be shown.
        by: Owner of the token that sets it.
        now: Seconds since the epoch.
    """
    remove(session, project_id)
    sealed = seal(key, _place(project_id), url)
    row = NoticeUrl(project_id=project_id, sealed=sealed, shown=shown, set_by=values.text(by), updated=now)
    session.add(row)
    session.flush()
    return row


def remove(session: Session, project_id: str) -> bool:
    """Remove the URL of a project; False if it has none."""
    removed = delete(NoticeUrl).where(NoticeUrl.project_id == project_id)
    return session.scalar(removed.returning(NoticeUrl.project_id)) is not None


def url_of(key: bytes, row: NoticeUrl) -> str:
    """The URL.

    Raises:
        Conflict: It was sealed with another key.
    """
    try:
        return unseal(key, _place(row.project_id), row.sealed)
    except ValueError as error:
        raise Conflict("the URL was set under another --secrets-key-file; set it again") from error


def waiting(session: Session, *, since: float, limit: int, without: Collection[str] = ()) -> list[Waiting]:
    """Runs that ended at or after a time, and after a URL for them was set, without a notice; the first to end first.

    Args:
        session: Reading transaction.
        since: Time from which on runs ended.
        limit: Maximum number of runs.
        without: Ids of projects whose URLs are left out.
    """
    own, default, parent = aliased(NoticeUrl), aliased(NoticeUrl), aliased(RunRow)
    query = (
        select(RunRow, own, default, parent.held_out_loss)
        .options(*LEFT_OUT)
        .outerjoin(own, own.project_id == RunRow.project)
        .outerjoin(Project, (Project.owner == RunRow.owner) & (Project.name == RunRow.owner))
        .outerjoin(default, default.project_id == Project.id)
        .outerjoin(parent, (parent.id == RunRow.parent) & (parent.project == RunRow.project))
        .where(RunRow.ended >= since, RunRow.noticed.is_(None))
        .where(or_(own.updated <= RunRow.ended, own.project_id.is_(None) & (default.updated <= RunRow.ended)))
        .where(func.coalesce(own.project_id, default.project_id).not_in(without))
        .order_by(RunRow.ended, RunRow.id)
        .limit(limit)
    )
    return [Waiting(run, first or second, loss) for run, first, second, loss in session.execute(query)]


def outcome(session: Session, found: Waiting, now: float, failure: str | None) -> None:
    """Store what became of a notice, unless the run was resumed or the URL was replaced meanwhile."""
    is_same = (NoticeUrl.project_id == found.url.project_id) & (NoticeUrl.updated == found.url.updated)
    changes = {"failure": failure} if failure is not None else {"failure": None, "sent": now}
    session.execute(update(NoticeUrl).where(is_same).values(**changes).execution_options(synchronize_session=False))
    if failure is None:
        session.execute(
            update(RunRow)
            .where(RunRow.id == found.run.id, RunRow.ended == found.run.ended)
            .values(noticed=now)
            .execution_options(synchronize_session=False)
        )


def _place(project_id: str) -> str:
    return f"notice URL of project {project_id}"
