from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.meanings import add_meanings

LONGEST_TEXT = 4096
"""Maximum length of a text setting (characters), because a service checks configurations from many users."""
LARGEST = 2**53 - 1
"""Maximum of a whole-number setting without a narrower limit: JSON and floating-point numbers hold it exactly."""
MOST_EXPERTS = 65_536
MOST_CLUSTERS = 4096


class Section(BaseModel):
    """A section of the configuration: frozen, with texts of bounded length; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        str_max_length=LONGEST_TEXT,
        json_schema_extra=add_meanings,
        defer_build=True,  # commands that read no configuration need not wait until its checks are built
    )
