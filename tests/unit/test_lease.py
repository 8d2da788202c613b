"""The lease of a run at a URI: one driver at a time works on it, and one that lost its lease changes nothing more."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_s3 import Fault, faulty_s3
from machine import Machine
from pinned_runs import config_of
from s3_standin import s3_server

from moedisco_ray.core.errors import RunDirError, RunError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store import lease
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.core.store.lease import is_leased, leased
from moedisco_ray.core.store.live_files import LiveFiles
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_takeover import collect
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEW", 0.2), ("POLL", 0.05), ("SETTLE", 0.1), ("NOTICE", 0.4)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


@pytest.fixture
def server() -> Iterator[str]:
    with s3_server("runs") as server:
        yield server


@pytest.fixture(params=["disk", "s3"])
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> list[Machine]:
    uri = f"file://{tmp_path}/bucket/run"
    if request.param == "s3":
        uri = f"s3://runs/{tmp_path.name}?endpoint_override={request.getfixturevalue('server')}&scheme=http"
    return [Machine(tmp_path / name, uri) for name in ("one", "other")]


def test_one_driver_at_a_time_on_one_machine_and_on_two(machines: list[Machine]) -> None:
    store, other = machines[0].store, machines[1].store
    with leased(store, 0.0) as first:
        assert first.fresh
        assert is_leased(other)
        for second in (store, other):
            with pytest.raises(RunDirError, match="another process works on this run"), leased(second, 0.0):
                raise AssertionError
        first.check()
    assert not is_leased(other)
    with leased(store, 0.0) as again:
        assert not again.fresh
    with leased(other, 0.0) as moved:
        assert moved.fresh


def test_a_dead_drivers_lease_is_taken_over_and_a_lost_one_is_noticed(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 10.0)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    store, other = machines[0].store, machines[1].store
    with leased(store, 0.0) as cut_off:  # its first renewal is 10 s away: it seems dead
        with leased(other, 0.0) as taken:
            assert taken.fresh
        monkeypatch.setattr(lease, "RENEW_SECONDS", 0.0)
        cut_off.keep()
        with pytest.raises(RunError, match="taken over"):
            cut_off.check()
    assert json.loads(store.read("lease.json") or b"")["released"]


def test_a_driver_that_was_cut_off_commits_deletes_and_uploads_nothing_more(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 100.0)  # it has no chance to notice by a renewal
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    store, other = machines[0].store, machines[1].store
    with leased(store, 0.0) as cut_off:
        draft = begin_draft(store)
        store.publish(draft / "file")
        with leased(other, 0.0) as successor:
            collect(other)  # deletes the objects that no manifest lists
            with pytest.raises(RunError, match="taken over"):
                store.replace(draft, store.directory / "corpus", {}, cut_off.check)
            with pytest.raises(RunError, match="taken over"), LiveFiles(store, ("events.jsonl",), cut_off.check):
                (store.directory / "events.jsonl").write_text("late")
            other.replace(begin_draft(other), other.directory / "corpus", {}, successor.check)
    assert other.files(other.directory / "corpus") == [other.directory / "corpus" / "file"]
    assert store.read("events.jsonl") is None
    assert read_manifest(store.directory / "corpus") is None


def test_a_run_that_was_taken_over_during_a_stage_ends_without_its_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 100.0)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    config = config_of("qwen3_moe", tmp_path).model_copy(update={"output": f"file://{tmp_path}/bucket"})
    store = RunStore.of(config.location)
    taken = b'{"session": "another", "copy": "another", "released": false}'

    def take_over(event: Event) -> None:
        if event.type == "stage_started":
            store.remote.write("lease.json", taken)

    with pytest.raises(RunError, match="taken over"):
        pipeline.run(config, (take_over,), backend=LocalBackend())
    assert store.manifest("corpus") is None
    assert store.read("events.jsonl") is None
    assert store.read("lease.json") == taken


def test_a_late_first_write_leaves_the_other_driver_time_to_notice(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 100.0)  # a renewal at the same moment could make the late one give way
    held_up, pass_on = threading.Event(), threading.Event()

    def fault(method: str, path: str) -> Fault:
        if method == "PUT" and "lease.json" in path and not pass_on.is_set():
            held_up.set()
            pass_on.wait(60)
        return "pass"

    with faulty_s3(server) as (proxy, slow_server), ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as ending:
        ending.callback(pass_on.set)
        proxy.faults = fault
        store, slow = (
            Machine(tmp_path / name, f"s3://runs/{tmp_path.name}?endpoint_override={host}&scheme=http").store
            for name, host in (("one", server), ("other", slow_server))
        )
        # a new S3 client would wait for the request that is held up
        assert store.remote.list() == slow.remote.list() == {}

        def start_late() -> float:
            with leased(slow, 0.0) as late:
                late.check()
                return time.monotonic()

        starting = thread.submit(start_late)
        assert held_up.wait(60)
        with leased(store, 0.0) as first:
            first.check()
            passed_on = time.monotonic()
            pass_on.set()
            begun = starting.result(60)
            assert begun - passed_on >= lease.NOTICE_SECONDS
            with pytest.raises(RunError, match="taken over"):
                first.check()
    assert json.loads(store.read("lease.json") or b"")["released"]  # by the late one; the first one leaves it alone


def begin_draft(store: RunStore) -> Path:
    draft = store.draft(store.directory / "corpus")
    draft.mkdir(parents=True)
    (draft / "file").write_text("content")
    return draft
