"""Base of all request and response bodies, common field types, and the responses about health and errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from service.domain.policies import HIGHEST_PRIORITY

DisplayName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
Priority = Annotated[int, Field(ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY)]
Dollars = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Note = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$")]
"""Text of several lines, without control characters other than tabs and line feeds."""
ProjectReference = Annotated[str, Field(min_length=1, max_length=64)]
"""Id or name of a project."""
Scope = Literal["read", "submit", "admin"]
"""Each scope includes those before it. `admin` allows access to all owners' runs, tokens and prices, and to the audit
log."""


def example(**values: Any) -> ConfigDict:
    """Pydantic configuration of a model, with an example for the API reference."""
    return ConfigDict(json_schema_extra={"examples": [values]})


class Document(BaseModel):
    """Base of all request and response bodies: frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def of(cls, row: object) -> Self:
        """Create the body from the attributes of a database row."""
        return cls.model_validate(row, from_attributes=True)


class Health(Document):
    """Health of the service."""

    status: Literal["ok", "degraded", "unavailable"]
    """`degraded` if the service works, but not for all runs; only `unavailable` has the status 503."""
    checks: dict[str, str]
    """For each part of the service, `ok` or a description of the problem."""


class Mistake(Document):
    """One error in a request."""

    field: str
    """Dotted path, such as `config.clusters.count`."""
    message: str


class Problem(Document):
    """An error, in the form of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[Mistake] = Field(default_factory=list)
