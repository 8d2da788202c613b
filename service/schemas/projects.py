"""Projects and their members."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from service.domain.access import MemberRole, Role
from service.domain.policies import Owner
from service.domain.run_paths import is_id
from service.schemas.base import Document, example


def _no_id(name: str) -> str:
    if is_id(name):
        raise ValueError("has the form of an id; choose another name")
    return name


class ProjectRequest(Document):
    """A project to create."""

    model_config = example(name="german-law")

    name: Annotated[Owner, AfterValidator(_no_id)]


class MemberRequest(Document):
    """What a member may do."""

    model_config = example(role="viewer")

    role: MemberRole
    """A `viewer` sees the runs of the project; an `editor` also submits, changes, stops and deletes them."""


class MemberInfo(Document):
    """A member of a project, who is not its owner."""

    name: str
    role: MemberRole


class ProjectInfo(Document):
    """A project."""

    id: str
    name: str
    """Name among the owner's projects; the default project has the owner's name."""
    owner: str
    created: float
    role: Role
    """What the caller is in the project; administrators count as its owner."""
    members: list[MemberInfo]


class ProjectPage(Document):
    """Projects, oldest first."""

    items: list[ProjectInfo]
