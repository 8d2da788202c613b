"""A run at a URI waits while its store fails at seeded moments, and gets the same bits.

The store refuses, throttles, slows and cuts requests.

CHAOS_SEEDS is the number of seeds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import Fault, faulty_s3, seeded
from pinned_runs import config_of, results
from s3_standin import s3_server

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.store import remote
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SEEDS = int(os.environ.get("CHAOS_SEEDS", "30"))
SHARE = 0.03
FAULTS: tuple[Fault, ...] = ("refuse", "throttle", "slow", "cut")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any]:
    """The configuration of a run in a directory, and what it gave."""
    config = config_of("qwen3_moe", tmp_path_factory.mktemp("undisturbed"))
    return config, results(pipeline.run(config, backend=LocalBackend()))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_disturbed_store_changes_no_bit(
    undisturbed: tuple[RunConfig, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_PAUSES", (0.1,) * 8)
    config, expected = undisturbed
    with s3_server("runs") as server, faulty_s3(server) as (proxy, address):
        proxy.faults = seeded(FAULTS, SHARE, seed)
        config = config.model_copy(update={"output": f"s3://runs/seed-{seed}?endpoint_override={address}&scheme=http"})
        directory = pipeline.run(config, backend=LocalBackend())
        RunStore.of(config.location).fetch(directory / "model", directory / "report.json")
        assert results(directory) == expected
        assert all(proxy.counts[fault] for fault in FAULTS)
