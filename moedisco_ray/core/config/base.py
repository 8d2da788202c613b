from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

LONGEST_TEXT = 4096
"""Maximum length of a text setting (characters), because a service checks configurations from many users."""
LARGEST = 2**53 - 1
"""Maximum of a whole-number setting without a narrower limit: JSON and floating-point numbers hold it exactly."""
MOST_EXPERTS = 65_536
MOST_CLUSTERS = 4096


def _inherit_meanings(schema: dict[str, Any], section: type[BaseModel]) -> None:
    """Add the docstring of a base class's field where a section states another default alone."""
    for name, field in schema["properties"].items():
        bases = [base for base in section.__mro__[1:] if issubclass(base, BaseModel) and name in base.model_fields]
        meaning = next(filter(None, (base.model_fields[name].description for base in bases)), None)
        if meaning is not None:
            field.setdefault("description", meaning)


class Section(BaseModel):
    """A section of the configuration: frozen, with texts of bounded length; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        str_max_length=LONGEST_TEXT,
        json_schema_extra=_inherit_meanings,
        defer_build=True,  # commands that read no configuration need not wait until its checks are built
    )
