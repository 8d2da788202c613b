from __future__ import annotations

from databases import database, database_url, empty_database, postgresql_url

__all__ = ["database", "database_url", "empty_database", "postgresql_url"]
