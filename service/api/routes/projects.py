"""Routes of projects and their members."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from fastapi import APIRouter, Path
from sqlalchemy.orm import Session

from service.api.bodies import StrictRoute
from service.api.context import InContext
from service.api.openapi import problems
from service.api.parameters import Cursor, Limit, ProjectName
from service.api.security import SIGNED_IN, Reader, Submitter, project_for
from service.api.submission import note
from service.database import access_tables, projects
from service.domain.access import Role
from service.domain.policies import Owner
from service.errors import Conflict, NotFound
from service.schemas import MemberInfo, MemberRequest, ProjectInfo, ProjectPage, ProjectRequest

router = APIRouter(prefix="/v1/projects", tags=["projects"], route_class=StrictRoute, dependencies=SIGNED_IN)

MOST_PROJECTS = 1000
"""Maximum number of projects of an owner."""
MOST_MEMBERS = 1000
"""Maximum number of members of a project."""

_Member = Annotated[Owner, Path(description="Owner that the member's tokens act for.", examples=["bob"])]


@router.get("", responses=problems())
def list_projects(caller: Reader, context: InContext, cursor: Cursor = None, limit: Limit = 50) -> ProjectPage:
    """List the caller's projects with their members; for an administrator, all projects."""
    with context.database.read() as session:
        found, following = projects.page(session, caller.person, cursor=cursor, limit=limit)
        return ProjectPage(items=_answers(session, found), next_cursor=following)


@router.post("", status_code=201, responses=problems(409, body=True))
def create_project(body: ProjectRequest, caller: Submitter, context: InContext) -> ProjectInfo:
    """Create a project, whose owner is the caller."""
    now = context.now()
    with context.database.write() as session:
        row = projects.create(session, caller.owner, body.name, now, MOST_PROJECTS)
        note(session, caller, "project.create", row.id, now=now, detail={"name": row.name})
        return _answers(session, [(row, "owner")])[0]


@router.patch("/{project}", responses=problems(404, 409, body=True))
def rename_project(project: ProjectName, body: ProjectRequest, caller: Submitter, context: InContext) -> ProjectInfo:
    """Rename a project; only its owner may do this. The project with the owner's name keeps it."""
    now = context.now()
    with context.database.write() as session:
        row = project_for(session, caller, project, "manage")
        note(session, caller, "project.rename", row.id, now=now, detail={"from": row.name, "name": body.name})
        projects.rename(session, row, body.name)
        return _answers(session, [(row, "owner")])[0]


@router.delete("/{project}", status_code=204, responses=problems(404, 409))
def delete_project(project: ProjectName, caller: Submitter, context: InContext) -> None:
    """Delete a project without runs, with its members and secrets; only its owner may do this."""
    now = context.now()
    with context.database.write() as session:
        row = project_for(session, caller, project, "manage")
        projects.remove(session, row)
        note(session, caller, "project.delete", row.id, now=now, detail={"name": row.name})


@router.put("/{project}/members/{member}", responses=problems(404, 409, body=True))
def put_member(
    project: ProjectName, member: _Member, body: MemberRequest, caller: Submitter, context: InContext
) -> ProjectInfo:
    """Add a member to a project, or change a member's role; only the project's owner may do this."""
    now = context.now()
    with context.database.write() as session:
        row = project_for(session, caller, project, "manage")
        if member == row.owner:
            raise Conflict(f"{member} is the owner of this project and may do all")
        projects.put_member(session, row.id, member, body.role, MOST_MEMBERS)
        note(session, caller, "project.member", row.id, now=now, detail={"member": member, "role": body.role})
        return _answers(session, [(row, "owner")])[0]


@router.delete("/{project}/members/{member}", status_code=204, responses=problems(404, 409))
def remove_member(project: ProjectName, member: _Member, caller: Submitter, context: InContext) -> None:
    """Remove a member from a project. Only its owner may do this, but members may remove themselves."""
    now = context.now()
    with context.database.write() as session:
        row = project_for(session, caller, project, "see" if member == caller.owner else "manage")
        if not projects.remove_member(session, row.id, member):
            raise NotFound(f"this project has no member {member}")
        note(session, caller, "project.member", row.id, now=now, detail={"member": member, "role": None})


def _answers(session: Session, found: Sequence[tuple[access_tables.Project, Role]]) -> list[ProjectInfo]:
    members = projects.members(session, [row.id for row, _ in found])
    return [_answer(row, role, members.get(row.id, [])) for row, role in found]


def _answer(row: access_tables.Project, role: Role, members: Iterable[access_tables.Member]) -> ProjectInfo:
    return ProjectInfo(
        id=row.id,
        name=row.name,
        owner=row.owner,
        created=row.created,
        role=role,
        members=[MemberInfo.of(each) for each in members],
    )
