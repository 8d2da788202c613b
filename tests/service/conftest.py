from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_client import Service, service
from browser import browser
from databases import database, database_url, empty_database, postgresql_url

__all__ = ["browser", "database", "database_url", "empty_database", "postgresql_url"]


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Service]:
    """The application, on each kind of database."""
    with service(tmp_path, database_url=database_url) as made:
        yield made
