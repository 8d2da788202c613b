"""Parameters of several routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Path, Query
from pydantic import BeforeValidator

from service.domain.run_paths import ULID_PATTERN
from service.schemas.mistakes import LARGEST


def _truth(value: object) -> object:
    """Accept only `true` and `false`. A value such as `yes` or `1` is refused, because it may be meant for another parameter."""
    if not isinstance(value, bool) and value not in ("true", "false"):
        raise ValueError("must be `true` or `false`")
    return value in (True, "true")


Flag = Annotated[bool, BeforeValidator(_truth)]
"""A boolean query parameter."""

RunId = Annotated[str, Path(max_length=64, description="Id of a run.", examples=["01JDB5W3XQ3N8QZ7V0G6M4T9KE"])]
ThingId = Annotated[str, Path(max_length=64, description="Id of the token, webhook or delivery.")]
Cursor = Annotated[str | None, Query(pattern=f"^{ULID_PATTERN}$", description="`next_cursor` of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=200, description="Maximum number of items on a page.")]
After = Annotated[int | None, Query(ge=-1, le=LARGEST, description="Last known position; -1 for none.")]
LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=-1, le=LARGEST, description="Same as `after`; browsers send it when they reconnect.")]
IdempotencyKey = Annotated[str | None, Header(
    alias="Idempotency-Key", min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$",
    description="Makes the request safe to repeat within a day.", examples=["7c0f6f0e-demo"])]
