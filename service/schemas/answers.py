"""What the service says of itself, and of a mistake."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.schemas.base import Document


class Health(Document):
    """Whether the service lives, or can work."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]
    """Each part and `ok`, or what is wrong with it."""


class Mistake(Document):
    """One mistake in a request."""

    field: str
    """Dotted path: `config.clusters.count`."""
    message: str


class Problem(Document):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[Mistake] = Field(default_factory=list)
