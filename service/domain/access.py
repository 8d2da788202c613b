"""Who may do what to a project and to the runs in it; every route and every list asks here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal, get_args

from service.errors import Forbidden, NotFound

MemberRole = Literal["viewer", "editor"]
Role = MemberRole | Literal["owner"]
"""What a person is in a project. An administrator counts as an owner of every project."""
Action = Literal["see", "edit", "manage"]
"""`see` covers lists, events, logs, downloads and comparisons; `edit` submits, retries, changes, cancels, resumes and
deletes runs; `manage` changes members."""

ROLES: tuple[Role, ...] = (*get_args(MemberRole), "owner")
"""Each role may do what those before it may."""


@dataclasses.dataclass(frozen=True)
class Person:
    """Someone who asks for something.

    Attributes:
        name: Owner that the person's tokens act for.
        admin: Whether the person may do all to every project.
    """

    name: str
    admin: bool = False


_LEAST: Mapping[Action, Role] = {"see": "viewer", "edit": "editor", "manage": "owner"}


def roles_for(action: Action) -> tuple[Role, ...]:
    """The roles that may do something."""
    return ROLES[ROLES.index(_LEAST[action]) :]


def check_token(person: Person, scopes: Collection[str], owner: str | None, wanted: Collection[str]) -> None:
    """Refuse to make, rotate or revoke a token that a person has no right to.

    Args:
        person: Who asks.
        scopes: Scopes of the token with which the person asks, with those that they include.
        owner: Owner of the token; None if it does not exist.
        wanted: Scopes of the token.

    Raises:
        NotFound: The token does not exist, or belongs to another person.
        Forbidden: The token has a scope that the person's own token has not.
    """
    if owner is None or not (person.admin or owner == person.name):
        raise NotFound("there is no such token, or it is not yours")
    beyond = sorted(set(wanted) - set(scopes))
    if beyond:
        raise Forbidden(f"the token would have or has the scope {beyond[0]!r}, which your own token has not")


def check_access(role: Role | None, action: Action, thing: str) -> None:
    """Refuse what a role does not allow; a stranger does not learn that the thing exists.

    Args:
        role: Role of the caller in the project; None for a stranger.
        action: What the caller wants to do.
        thing: Noun for the message, `run` or `project`.

    Raises:
        NotFound: The caller is a stranger, or the thing does not exist.
        Forbidden: The role does not allow the action.
    """
    if role is None:
        raise NotFound(f"there is no such {thing}, or it is not yours")
    if role not in roles_for(action):
        raise Forbidden(f"you are {role} in this project, and this needs its {_LEAST[action]}; ask the project's owner")
