from __future__ import annotations

from pydantic import BaseModel, ConfigDict

LONGEST_TEXT = 4096
"""Characters of a setting's text; a service plans configurations from many people."""
LARGEST = 2**53 - 1
"""Largest whole number of a setting that has no narrower limit: JSON and floating-point numbers hold it exactly."""
MOST_EXPERTS = 65_536
MOST_CLUSTERS = 4096


class Section(BaseModel):
    """A part of the configuration: frozen, of bounded length, and a key it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, str_max_length=LONGEST_TEXT)
