"""A Ray cluster that does not answer is reported at once, in one line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import ray
from small_run import small_config

from moedisco_ray.core.errors import PoolError
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.ray import session


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265", "head", "no.such.host.invalid:6379", None])
def test_an_address_without_a_cluster_is_refused(address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = address or closed_port()
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    config = small_config(tmp_path)
    pipeline.claim(config, redo=False)
    with pytest.raises(PoolError, match="no Ray cluster answers there") as caught, session.ray_cluster(config):
        pytest.fail("it has joined something")
    assert (caught.value.field, caught.value.value) == ("RAY_ADDRESS", address)
