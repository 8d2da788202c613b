"""What all documents are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.domain.policies import HIGHEST_PRIORITY

DisplayName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
Priority = Annotated[int, Field(ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY)]
Dollars = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scope = Literal["read", "submit", "admin"]
"""Each holds those before it. `admin` sees every owner's runs, tokens, prices and the audit log."""


def example(**values: Any) -> ConfigDict:
    """A document's settings with an example for the API's description."""
    return ConfigDict(json_schema_extra={"examples": [values]})


class Document(BaseModel):
    """Base: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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
