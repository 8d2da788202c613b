"""A text setting that names an entry of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclasses.dataclass(frozen=True)
class KeyOf:
    """Marks a text that must be a key of a table; the table is read at each check.

    Attributes:
        table: The table.
    """

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check that the table has the key."""
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """The schema, with all keys."""
        return {"type": "string", "enum": list(self.table)}

    def _known(self, key: str) -> str:
        if key not in self.table:
            *others, last = map(repr, self.table)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticCustomError("literal_error", "must be {expected}", {"expected": expected})
        return key
