"""Parameters of several routes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated

from fastapi import Header, Path, Query, Request
from fastapi.dependencies.models import Dependant
from pydantic import BeforeValidator

from service.domain.run_list import NO_CURSOR
from service.domain.run_paths import ULID_PATTERN, is_id
from service.errors import InvalidRequest, PreconditionFailed
from service.schemas.mistakes import LARGEST


def _truth(value: object) -> object:
    """Accept only `true` and `false`.

    A value such as `yes` or `1` is refused, because it may be meant for another parameter.
    """
    if not isinstance(value, bool) and value not in ("true", "false"):
        raise ValueError("must be `true` or `false`")
    return value in (True, "true")


def _cursor(text: str) -> str:
    if not is_id(text):
        raise ValueError(NO_CURSOR)
    return text


Flag = Annotated[bool, BeforeValidator(_truth)]
"""A boolean query parameter."""

RunId = Annotated[str, Path(max_length=64, description="Id of a run.", examples=["01JDB5W3XQ3N8QZ7V0G6M4T9KE"])]
ProjectName = Annotated[
    str, Path(alias="project", max_length=64, description="Id or name of a project.", examples=["german-law"])
]
ThingId = Annotated[str, Path(max_length=64, description="Id of the token.")]
Cursor = Annotated[
    str | None,
    BeforeValidator(_cursor),
    Query(pattern=f"^{ULID_PATTERN}$", description="`next_cursor` of the previous page."),
]
Limit = Annotated[int, Query(ge=1, le=200, description="Maximum number of items on a page.")]
After = Annotated[int | None, Query(ge=-1, le=LARGEST, description="Last known position; -1 for none.")]
LastEventId = Annotated[
    int | None,
    Header(
        alias="Last-Event-ID", ge=-1, le=LARGEST, description="Same as `after`; browsers send it when they reconnect."
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=128,
        pattern=r"^[\x21-\x7e]+$",
        description="Makes the request safe to repeat within a day.",
        examples=["7c0f6f0e-demo"],
    ),
]
IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        max_length=1024,
        description="`ETag` of the run as it was read; if the run has changed since, nothing is done (status 412).",
    ),
]

_LONGEST_KEY = 64


def etag(version: int) -> str:
    """ETag of a run: the version of its state and of its settings, which progress and cost do not change."""
    return f'"{version}"'


def check_match(if_match: str | None, version: int) -> None:
    """Compare the header If-Match of a request with the version of the run.

    The mark of a weak tag (`W/`) is ignored, although RFC 9110 compares If-Match strongly. A proxy that compresses an
    answer marks its tag as weak, since the bytes have changed. This tag names a version of the run's state, however it
    was sent.

    Raises:
        PreconditionFailed: The header names other versions.
    """
    named = [] if if_match is None else [each.strip().removeprefix("W/") for each in if_match.split(",")]
    if named and "*" not in named and etag(version) not in named:
        raise PreconditionFailed(f"If-Match: the run has changed since, and its ETag is {etag(version)}; read it again")


async def check_query(request: Request) -> None:
    """Refuse query keys that the route does not have: a misspelt filter would select everything.

    Raises:
        InvalidRequest: A key is unknown.
    """
    if not request.query_params:
        return
    known = list(_query_keys(request.scope["route"].dependant))
    unknown = [key[:_LONGEST_KEY] for key in dict.fromkeys(request.query_params.keys()) if key not in known]
    if unknown:
        raise InvalidRequest([(key, _no_such_key(key, known)) for key in unknown[:_LONGEST_KEY]])


def _query_keys(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for part in dependant.dependencies:
        yield from _query_keys(part)


def _no_such_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"no such query parameter; did you mean {close[0]!r}?"
    return (
        f"no such query parameter; known are {', '.join(sorted(known))}"
        if known
        else "no such query parameter; remove it"
    )
