"""Projects, their members, and which rows a person may reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, bindparam, delete, func, literal, or_, select, true, union_all
from sqlalchemy.orm import Session

from service.database import values
from service.database.access_tables import Member, Project
from service.database.dataset_tables import DatasetRow
from service.database.ids import new_id
from service.database.paging import page_by_id
from service.database.session import lock_until_commit
from service.database.tables import RunRow
from service.domain.access import Action, MemberRole, Person, Role, roles_for
from service.errors import Conflict, NotFound

_BY_ID = select(Project).where(Project.id.in_(bindparam("ids", expanding=True)))
"""Made once: every answer asks this, and making it takes longer."""


def default_of(session: Session, owner: str, now: float) -> Project:
    """The project of an owner's runs that name no other; it has the owner's name and is created when it is needed."""
    lock_until_commit(session, "projects", owner)
    return _of_owner(session, owner, owner) or _insert(session, owner, owner, now)


def create(session: Session, owner: str, name: str, now: float, most: int) -> Project:
    """Create a project.

    Raises:
        Conflict: The owner has a project of this name, or `most` projects.
    """
    lock_until_commit(session, "projects", owner)
    if _of_owner(session, owner, name) is not None:
        raise Conflict(f"you have a project with the name {name}; choose another name")
    if _count(session, Project.owner == values.text(owner)) >= most:
        raise Conflict(f"you have {most} projects, and there may be no more")
    return _insert(session, owner, name, now)


def rename(session: Session, row: Project, name: str) -> None:
    """Give a project another name.

    Raises:
        Conflict: The project is the owner's default one, or its owner has or will have another one of this name.
    """
    lock_until_commit(session, "projects", row.owner)
    if row.name == row.owner:
        raise Conflict(f"this is {row.owner}'s own project, which keeps its name; move its runs to another one")
    if name == row.owner or _of_owner(session, row.owner, name) not in (None, row):
        raise Conflict(f"{row.owner} has a project with the name {name}; choose another name")
    row.name = values.text(name)
    session.flush()


def remove(session: Session, row: Project) -> None:
    """Delete a project without runs and data sets, with its members, its secrets and its URL for notices.

    Raises:
        Conflict: Runs or data sets belong to the project.
    """
    hold(session, row.id)
    if count := session.scalar(select(func.count()).where(RunRow.project == row.id)):
        raise Conflict(f"the project has {count} runs; delete them, or move them to another project, then delete it")
    if count := session.scalar(select(func.count()).where(DatasetRow.project == row.id)):
        raise Conflict(f"the project has {count} data sets; delete them, then delete it")
    session.execute(delete(Project).where(Project.id == row.id))


def hold(session: Session, project_id: str) -> None:
    """Keep others from deleting a project until this transaction ends.

    Raises:
        NotFound: It was deleted.
    """
    lock_until_commit(session, "runs of project", project_id)
    if session.scalar(select(Project.id).where(Project.id == project_id)) is None:
        raise NotFound("this project was deleted; name another one")


def find(session: Session, person: Person, name: str) -> list[tuple[Project, Role]]:
    """The projects with an id or name that a person may see, each with the person's role.

    An id decides, then the person's own project: a name that another owner chooses does not change what this one means.
    """
    rows = session.scalars(select(Project).where(_is_named(name), visible(Project.id, person)).order_by(Project.id))
    found = _with_roles(session, person, list(rows))
    exact = [each for each in found if each[0].id == name] or [each for each in found if each[0].owner == person.name]
    return exact or found


def page(
    session: Session, person: Person, *, cursor: str | None = None, limit: int
) -> tuple[list[tuple[Project, Role]], str | None]:
    """The projects that a person may see, each with the person's role, oldest first, and the cursor of the next page.

    The cursor is None on the last page.
    """
    query = select(Project).where(visible(Project.id, person))
    rows, following = page_by_id(session, query, Project.id, cursor=cursor, limit=limit)
    return _with_roles(session, person, rows), following


def visible(project_id: Any, person: Person, action: Action = "see") -> ColumnElement[bool]:
    """Condition that a person may do something to the rows of a project.

    Args:
        project_id: Column with the id of the project.
        person: The person.
        action: What the person wants to do.
    """
    if person.admin:
        return true()
    mine = _roles(person)
    condition: ColumnElement[bool] = project_id.in_(select(mine.c.id).where(mine.c.role.in_(roles_for(action))))
    return condition


def named(project_id: Any, name: str) -> ColumnElement[bool]:
    """Condition that rows belong to a project with this id or name."""
    condition: ColumnElement[bool] = project_id.in_(select(Project.id).where(_is_named(name)))
    return condition


def role(session: Session, person: Person, project_id: str) -> Role | None:
    """A person's role in a project; None for a stranger."""
    return roles(session, person, [project_id]).get(project_id)


def roles(session: Session, person: Person, project_ids: Iterable[str]) -> dict[str, Role]:
    """A person's role by project, without those in which the person is a stranger."""
    wanted = set(project_ids)
    if person.admin:
        return dict.fromkeys(wanted, "owner")
    mine = _roles(person)
    return dict(session.execute(select(mine.c.id, mine.c.role).where(mine.c.id.in_(wanted))).all())


def by_id(session: Session, project_ids: Iterable[str]) -> list[Project]:
    """The projects with these ids."""
    return list(session.scalars(_BY_ID, {"ids": list(set(project_ids))}))


def members(session: Session, project_ids: Iterable[str]) -> dict[str, list[Member]]:
    """Members of projects, without the owners, by project and then by name."""
    found: dict[str, list[Member]] = defaultdict(list)
    for row in session.scalars(select(Member).where(Member.project_id.in_(set(project_ids))).order_by(Member.name)):
        found[row.project_id].append(row)
    return found


def put_member(session: Session, project_id: str, name: str, role: MemberRole, most: int) -> None:
    """Add a member, or change the role of one.

    Raises:
        Conflict: The project has `most` members.
    """
    lock_until_commit(session, "members", project_id)
    remove_member(session, project_id, name)
    if _count(session, Member.project_id == project_id) >= most:
        raise Conflict(f"the project has {most} members, and there may be no more")
    session.add(Member(project_id=project_id, name=values.text(name), role=role))
    session.flush()


def remove_member(session: Session, project_id: str, name: str) -> bool:
    """Remove a member; False if there is none of this name."""
    removed = delete(Member).where(Member.project_id == project_id, Member.name == values.text(name))
    return session.scalar(removed.returning(Member.name)) is not None


def _with_roles(session: Session, person: Person, rows: Sequence[Project]) -> list[tuple[Project, Role]]:
    mine = roles(session, person, [row.id for row in rows])
    return [(row, mine[row.id]) for row in rows]


def _roles(person: Person) -> Any:
    """Ids of a person's projects, each with the person's role."""
    name = values.text(person.name)
    owned = select(Project.id.label("id"), literal("owner").label("role")).where(Project.owner == name)
    return union_all(owned, select(Member.project_id, Member.role).where(Member.name == name)).subquery()


def _is_named(name: str) -> ColumnElement[bool]:
    return or_(Project.id == values.text(name), Project.name == values.text(name))


def _of_owner(session: Session, owner: str, name: str) -> Project | None:
    query = select(Project).where(Project.owner == values.text(owner), Project.name == values.text(name))
    return session.scalar(query)


def _count(session: Session, condition: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).where(condition)) or 0


def _insert(session: Session, owner: str, name: str, now: float) -> Project:
    row = Project(id=new_id(), owner=values.text(owner), name=values.text(name), created=now)
    session.add(row)
    session.flush()
    return row
