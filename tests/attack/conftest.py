"""Attacks by a tenant, who has a token that may submit and no other right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_client import PlanningHere, Service, plain_tracebacks, service
from starlette.testclient import TestClient

from service.planning.pool import PlanningPool

__all__ = ["plain_tracebacks"]

STORAGE_BUCKET = "s3://checkpoints/moe"
INPUT_BUCKET = "s3://texts/wiki"
INPUT_HUB = "hf://allowed"


@pytest.fixture
def planning() -> PlanningPool:
    """Plans without processes: most attacks are on what is decided, not on who computes it."""
    return PlanningHere()


@pytest.fixture
def api(tmp_path: Path, planning: PlanningPool) -> Iterator[Service]:
    """A service whose operator allows a directory and a bucket, for reading and for checkpoints.

    `tmp_path/secret` is outside of both.
    """
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("TOP SECRET")
    (secret / "config.json").write_text('{"model_type": "TOP SECRET"}')
    for folder in ("data", "checkpoints", "runs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "link").symlink_to(secret)
        (tmp_path / folder / "link.txt").symlink_to(secret / "key.txt")
    roots = {
        "input_roots": (str(tmp_path / "data"), INPUT_BUCKET, INPUT_HUB),
        "storage_roots": (str(tmp_path / "checkpoints"), STORAGE_BUCKET),
        "requests_per_minute": 100_000,
    }
    with service(tmp_path, planning, **roots) as made:
        yield made


@pytest.fixture
def tenant(api: Service) -> TestClient:
    """A client with the token of `ann`, who may submit."""
    return api.ann
