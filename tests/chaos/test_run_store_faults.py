"""A run at a URI whose store refuses, throttles, slows and cuts requests at seeded moments: it waits, and gets the same bits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from faulty_s3 import Fault, faulty_s3
from pinned_runs import config_of, results
from s3_standin import s3_server

from moedisco_ray.core import remote
from moedisco_ray.core.locations import CACHE
from moedisco_ray.core.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SHARE = 0.03
FAULTS: tuple[Fault, ...] = ("refuse", "throttle", "slow", "cut")


@pytest.mark.parametrize("seed", range(3))
def test_a_disturbed_store_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_PAUSES", (0.1,) * 8)
    config = config_of("qwen3_moe", tmp_path)
    expected = results(pipeline.run(config, backend=LocalBackend()))
    chance = random.Random(seed)
    with s3_server("runs") as server, faulty_s3(server) as (proxy, address):
        proxy.faults = lambda _method, _path: chance.choice(FAULTS) if chance.random() < SHARE else "pass"
        config = config.model_copy(update={"output": f"s3://runs/seed-{seed}?endpoint_override={address}&scheme=http"})
        directory = pipeline.run(config, backend=LocalBackend())
        RunStore.of(config.location).fetch(directory / "model", directory / "report.json")
        assert results(directory) == expected
        assert all(proxy.counts[fault] for fault in FAULTS)
