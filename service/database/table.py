"""Base of the tables. Times are seconds since the epoch (UTC); ids are ULIDs, which sort by time of creation."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Float, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase

from service.database.documents import Stored

ULID = String(26)
Position = BigInteger().with_variant(Integer, "sqlite")


class Table(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(
        naming_convention={
            # Migrations need names for constraints.
            "ix": "%(table_name)s_by_%(column_0_name)s",
            "uq": "%(table_name)s_%(column_0_name)s_unique",
            "fk": "%(table_name)s_%(column_0_name)s_known",
            "pk": "%(table_name)s_key",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own form
        str: Text,
        float: Float,
        int: Position,
        dict[str, Any]: Stored(dict[str, Any]),
        list[str]: Stored(list[str]),
    }
