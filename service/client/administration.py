"""Requests about access, projects and policies, which clients inherit."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, TypeVar

from service import schemas
from service.client.http import Connection, Request, json_body, segment
from service.domain.access import MemberRole
from service.domain.policies import Policies, Policy

T = TypeVar("T")
Item_co = TypeVar("Item_co", covariant=True)


class _Page(Protocol[Item_co]):
    @property
    def items(self) -> Sequence[Item_co]: ...

    @property
    def next_cursor(self) -> str | None: ...


class Administration:
    """Requests about tokens, projects, policies, quotas and the caller."""

    _connection: Connection

    async def quota(self, owner: str | None = None) -> schemas.Quota:
        """Limits and current usage of the caller; administrators may name another owner."""
        return await self._get(schemas.Quota, "/v1/quota", owner=owner)

    async def spending(
        self, group_by: Sequence[str] = ("owner", "project", "month"), month: str | None = None
    ) -> list[schemas.SpentDollars]:
        """Dollars spent on the caller's runs and in the caller's projects; for an administrator, all of them.

        Args:
            group_by: Fields to group by: `owner`, `project`, `month`.
            month: The only month to count, such as `2026-11`.
        """
        found = await self._get(schemas.SpendingPage, "/v1/spending", group_by=",".join(group_by), month=month)
        return found.items

    async def policies(self) -> Policies:
        """The policies of all owners."""
        return await self._get(Policies, "/v1/policies")

    async def set_policies(self, policies: Policies) -> None:
        """Replace all policies."""
        await self._connection.read(Request("PUT", "/v1/policies", body=_as_set(policies)))

    async def set_policy(self, owner: str, policy: Policy) -> None:
        """Replace the policy of one owner; fields that are not set take the default policy's value."""
        await self._connection.read(Request("PUT", f"/v1/policies/owners/{segment(owner)}", body=_as_set(policy)))

    async def delete_policy(self, owner: str) -> None:
        """Delete the policy of one owner; the default policy then applies."""
        await self._delete("policies/owners", owner)

    def tokens(self, *, page_size: int = 100) -> AsyncGenerator[schemas.TokenInfo]:
        """The caller's tokens without their secrets, oldest first; for an administrator, all tokens."""
        return self._pages(schemas.TokenPage, "/v1/tokens", page_size)

    async def create_token(
        self, name: str, owner: str | None, scopes: Sequence[schemas.Scope], expires_in_days: float | None = 90
    ) -> schemas.NewToken:
        """Create a token; only this response contains its secret.

        With `owner=None` it acts for the caller. With `expires_in_days=None` it does not expire.
        """
        wanted = {"name": name, "owner": owner, "scopes": list(scopes), "expires_in_days": expires_in_days}
        return await self._post(schemas.NewToken, "/v1/tokens", json.dumps(wanted).encode())

    async def rotate_token(self, token_id: str) -> schemas.NewToken:
        """Replace the secret of a token; only this response contains the new one."""
        return await self._post(schemas.NewToken, f"/v1/tokens/{segment(token_id)}/rotate")

    async def revoke_token(self, token_id: str) -> None:
        """Make a token invalid."""
        await self._delete("tokens", token_id)

    def projects(self, *, page_size: int = 100) -> AsyncGenerator[schemas.ProjectInfo]:
        """The caller's projects with their members, oldest first; for an administrator, all projects."""
        return self._pages(schemas.ProjectPage, "/v1/projects", page_size)

    async def create_project(self, name: str) -> schemas.ProjectInfo:
        """Create a project, whose owner is the caller."""
        return await self._post(schemas.ProjectInfo, "/v1/projects", json_body(name=name))

    async def rename_project(self, project: str, name: str) -> schemas.ProjectInfo:
        """Give a project another name; `project` is an id or name."""
        request = Request("PATCH", f"/v1/projects/{segment(project)}", body=json_body(name=name))
        return await self._connection.ask(schemas.ProjectInfo, request)

    async def delete_project(self, project: str) -> None:
        """Delete a project without runs, with its members and secrets; `project` is an id or name."""
        await self._delete("projects", project)

    async def set_member(self, project: str, member: str, role: MemberRole) -> schemas.ProjectInfo:
        """Add a member to a project, or change the member's role; `project` is an id or name."""
        request = Request("PUT", _member_path(project, member), body=json_body(role=role))
        return await self._connection.ask(schemas.ProjectInfo, request)

    async def remove_member(self, project: str, member: str) -> None:
        """Remove a member from a project; `project` is an id or name."""
        await self._connection.read(Request("DELETE", _member_path(project, member)))

    async def secrets(self, project: str) -> list[schemas.SecretInfo]:
        """Names and dates of a project's secrets; `project` is an id or name, or the caller's owner."""
        return (await self._get(schemas.SecretPage, _secrets_path(project))).items

    async def set_secret(self, project: str, name: str, value: str) -> schemas.SecretInfo:
        """Set a secret, which runs of the project may name; no answer shows its value."""
        request = Request("PUT", f"{_secrets_path(project)}/{segment(name)}", body=json_body(value=value))
        return await self._connection.ask(schemas.SecretInfo, request)

    async def delete_secret(self, project: str, name: str) -> None:
        """Delete a secret; drivers that have it keep it until they end."""
        await self._connection.read(Request("DELETE", f"{_secrets_path(project)}/{segment(name)}"))

    async def notice_url(self, project: str) -> schemas.NoticeUrl:
        """Where notices about ends of a project's runs are sent; the URL is not shown whole."""
        return await self._get(schemas.NoticeUrl, _notices_path(project))

    async def set_notice_url(self, project: str, url: str) -> schemas.NoticeUrl:
        """Set the URL that gets a notice about the end of each run of a project."""
        return await self._connection.ask(
            schemas.NoticeUrl, Request("PUT", _notices_path(project), body=json_body(url=url))
        )

    async def delete_notice_url(self, project: str) -> None:
        """Send no more notices about a project's runs."""
        await self._connection.read(Request("DELETE", _notices_path(project)))

    async def send_test_notice(self, project: str) -> None:
        """Send a notice that says that it is a test."""
        await self._connection.read(Request("POST", f"{_notices_path(project)}/test"))

    async def create_sign_in_code(self) -> schemas.NewSignInCode:
        """Create a code that signs one browser in with this client's token, within ten minutes."""
        return await self._post(schemas.NewSignInCode, "/v1/sign-in-codes")

    async def identity(self) -> schemas.Identity:
        """The caller's owner and rights, and the service's version."""
        return await self._get(schemas.Identity, "/v1/identity")

    async def _get(self, result: type[T], path: str, **params: object) -> T:
        return await self._connection.ask(result, Request("GET", path, params))

    async def _pages(
        self, result: type[_Page[Item_co]], path: str, page_size: int, **asked: object
    ) -> AsyncGenerator[Item_co]:
        """The items of a list; each page is requested when it is needed."""
        cursor: str | None = None
        while True:
            page = await self._get(result, path, **asked, cursor=cursor, limit=page_size)
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def _post(
        self, result: type[T], path: str, body: bytes | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> T:
        return await self._connection.ask(result, Request("POST", path, headers=headers, body=body))

    async def _delete(self, kind: str, identifier: str) -> None:
        await self._connection.read(Request("DELETE", f"/v1/{kind}/{segment(identifier)}"))


def _member_path(project: str, member: str) -> str:
    return f"/v1/projects/{segment(project)}/members/{segment(member)}"


def _secrets_path(project: str) -> str:
    return f"/v1/projects/{segment(project)}/secrets"


def _notices_path(project: str) -> str:
    return f"/v1/projects/{segment(project)}/notices"


def _as_set(policy: Policies | Policy) -> bytes:
    # Unset fields take the default's value; null means no limit and must be sent.
    return policy.model_dump_json(exclude_unset=True).encode()
