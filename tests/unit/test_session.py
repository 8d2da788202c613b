"""An unresponsive Ray cluster is reported at once, in one line; a local one that does not start is started again."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from small_run import small_config

from moedisco_ray.core.errors import PoolError, RunError
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.ray import session


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "http://127.0.0.1:8265", "head", "no.such.host.invalid:6379", None]
)
def test_an_address_without_a_cluster_is_refused(
    address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = address or closed_port()
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    config = small_config(tmp_path)
    pipeline.claim(config, redo=False)
    with pytest.raises(PoolError, match="no Ray cluster answers there") as caught, session.ray_cluster(config):
        pytest.fail("it has joined something")
    assert (caught.value.field, caught.value.value) == ("RAY_ADDRESS", address)


def test_a_ray_that_starts_late_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is started again after a failure; a view of the run says so.

    Before (af276e38): the exception of the first `ray.init` was raised (shown by the next test, without
    `START_PAUSES`).
    """
    late = Exception(
        "The current node timed out during startup. This could happen because some of the raylet failed to startup."
    )
    starts, events = iter([late, late, None]), list[Event]()
    _local_ray_that(starts, tmp_path, monkeypatch)
    with session.ray_cluster(small_config(tmp_path), events.append):
        assert next(starts, "started") == "started"
    assert [event.type for event in events] == ["ray_starting", "warning", "ray_starting", "warning", "ray_starting"]
    assert "Ray did not start (The current node timed out" in events[1].data["message"]


def test_a_ray_that_never_starts_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _local_ray_that(iter([Exception("line 1\nline 2")] * 9), tmp_path, monkeypatch)
    with pytest.raises(
        RunError, match=r"Ray did not start on this machine, 3 times in a row \(line 1 line 2\); end programs"
    ):
        session.ray_cluster(small_config(tmp_path)).__enter__()


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_gang_larger_than_the_machine_is_refused_before_any_work(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can join a Ray that the run has started for itself, so that the gang would wait for ever.

    Before (a0c02aba): the run began, and its gang waited.
    """
    _local_ray_that(iter([None, None]), tmp_path, monkeypatch)
    offered = {"CPU": 4, "low_mem_gpu": 2, "high_mem_gpu": 2, "GPU": gpus}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeID": "n", "Resources": offered, "Labels": {}}])
    config = small_config(tmp_path, pools={"low_memory": {"gpu": 0}, "high_memory": {"gpu": 1, "workers": 2}})
    says = (
        rf"^pools\.high_memory\.gpu: 1: this machine has {gpus or 'no'} GPU, and the run needs 2 at once; "
        r"lower pools\.high_memory\.workers, run it on a Ray cluster"
    )
    with pytest.raises(PoolError, match=says), session.ray_cluster(config) as messages:
        pytest.fail(f"it has begun: {messages}")
    offered["GPU"] = 2
    with session.ray_cluster(config) as messages:
        assert messages == []


def _local_ray_that(starts: Iterator[Exception | None], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ray.init` raise what comes next."""

    def init(**_settings: object) -> None:
        error = next(starts)
        if error is not None:
            raise error

    pipeline.claim(small_config(home), redo=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "START_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(session, "check_pools", lambda _config: [])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
