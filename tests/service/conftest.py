from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import PLANNING, PlanningHere, Service, plain_tracebacks, service
from browser import browser
from databases import (
    database,
    database_url,
    empty_database,
    empty_url,
    migrated_postgresql,
    postgresql_database,
    postgresql_url,
)

from service.database import documents
from service.planning.pool import PlanningPool

__all__ = [
    "browser",
    "database",
    "database_url",
    "empty_database",
    "empty_url",
    "migrated_postgresql",
    "plain_tracebacks",
    "postgresql_url",
]


@pytest.fixture(autouse=True)
def what_is_read_often_stays_as_it_was_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Documents that are read often are shared between requests, so nothing may change them."""
    read: dict[Any, Any] = {}

    def read_often(*asked: Any) -> Any:
        return read[asked] if asked in read else read.setdefault(asked, documents.read(*asked))

    monkeypatch.setattr(documents, "read_often", read_often)
    yield
    changed = [asked for asked, document in read.items() if repr(document) != repr(documents.read(*asked))]
    assert not changed


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Service]:
    """The application, on each kind of database."""
    with service(tmp_path, _planning(database_url), database_url=database_url) as made:
        yield made


def _planning(database_url: str | None) -> PlanningPool:
    """With SQLite, the processes that plan: what they do is the same with another database."""
    return PlanningHere() if database_url and database_url.startswith("postgresql") else PLANNING


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The same, once for a module's tests that change nothing but runs of their own."""
    home = tmp_path_factory.mktemp("shared")
    place = postgresql_database() if request.param == "postgresql" else contextlib.nullcontext(None)
    with place as url, service(home, _planning(url), database_url=url) as made:
        yield made
