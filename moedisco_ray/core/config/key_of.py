"""A text setting that names an entry of a table, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclasses.dataclass(frozen=True)
class KeyOf:
    """Marks a text that must be a key of a table, unless it is null; the table is read at each check.

    Attributes:
        table: The table.
    """

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check that the table has the key."""
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """The schema, with all keys."""
        names = {"type": "string", "enum": list(self.table)}
        return {"anyOf": [names, {"type": "null"}]} if "anyOf" in handler(schema) else names

    def _known(self, key: str | None) -> str | None:
        if key is not None and key not in self.table:
            *others, last = map(repr, self.table)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticCustomError("literal_error", "must be {expected}", {"expected": expected})
        return key
