"""A run on nodes that share no directory: its output is on an S3 server, and each node has a cache of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from s3_standin import s3_server
from small_run import same_outcome, small_config

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline

NODES: dict[str, dict[str, int]] = {"cpu": {}, "low": {"low_mem_gpu": 2}, "high": {"high_mem_gpu": 1}}

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of an S3 server; what starts later has its credentials."""
    monkeypatch.setenv(CACHE, str(tmp_path / "driver"))
    with s3_server("runs") as server:
        yield server


@pytest.fixture
def server(bucket: str, cluster: Cluster, tmp_path: Path) -> str:
    """The server, once there are three nodes that, like the driver, have a cache of their own."""
    for name, tags in NODES.items():
        cluster.add_node(
            num_cpus=2 if name == "cpu" else 0,
            resources=tags,
            object_store_memory=80_000_000,
            env_vars={CACHE: str(tmp_path / name)},
        )
    return bucket


def small(output: str) -> RunConfig:
    return small_config(Path("unused"), pools={"low_memory": {"max_workers": 1}}).model_copy(update={"output": output})


def test_nodes_that_share_nothing_give_the_same_bits(server: str, undisturbed: Path, tmp_path: Path) -> None:
    config = small(f"s3://runs/team?endpoint_override={server}&scheme=http")
    stop = StopFile(tmp_path / "stop")

    def listen(event: Event) -> None:
        if event.type == "progress" and event.stage == "submodels" and event.data["step"] >= 20:
            stop.request("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (listen,), stop=stop)
    shutil.rmtree(tmp_path / "driver")
    directory = pipeline.run(config)
    assert all(list((tmp_path / name).rglob("*.safetensors")) for name in NODES)
    store = RunStore.of(config.location)
    store.fetch(*(directory / stage.directory for stage in STAGES))
    same_outcome(directory, undisturbed)
    assert store.remote.list("logs")
    assert not store.remote.list("checkpoints")
