"""Projects and their members."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, SecretStr

from moedisco_ray.core.config.run import SecretName
from service.domain.access import MemberRole, Role
from service.domain.notices import check_url
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


LONGEST_SECRET = 4096
"""Maximum length of a secret (bytes)."""


def _storable(value: SecretStr) -> SecretStr:
    if not 0 < len(value.get_secret_value().encode("utf-8", "replace")) <= LONGEST_SECRET:
        raise ValueError(f"must have 1 to {LONGEST_SECRET} bytes")
    return value


class SecretRequest(Document):
    """The value of a secret, which no answer shows."""

    model_config = example(value="hf_...")

    value: Annotated[SecretStr, AfterValidator(_storable)]


class SecretInfo(Document):
    """A secret without its value."""

    name: SecretName
    set_by: str
    """Owner whose token set the value last."""
    updated: float


class SecretPage(Document):
    """Secrets by name."""

    items: list[SecretInfo]


def _sendable(url: SecretStr) -> SecretStr:
    check_url(url.get_secret_value())
    return url


class NoticeRequest(Document):
    """The URL that gets a notice about the end of each run, which no answer shows whole."""

    model_config = example(url="https://hooks.example.org/T0/B0/secret")

    url: Annotated[SecretStr, AfterValidator(_sendable)]
    """An https URL on the Internet, which gets a POST of JSON, or the URL of a product as apprise reads it: slack://,
    discord://, tgram://, gchat://, wxteams://, pover://, pagerduty://."""


class NoticeUrl(Document):
    """Where notices are sent."""

    shown: str
    """Scheme and host of the URL."""
    set_by: str
    updated: float
    sent: float | None
    """Time of the last notice that was accepted."""
    failure: str | None
    """Why the last notice was not accepted; null if it was. It is sent again for a day."""


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
    next_cursor: str | None
    """`cursor` of the next page; null on the last one."""
