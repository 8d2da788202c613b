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
