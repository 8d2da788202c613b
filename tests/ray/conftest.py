from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from small_run import undisturbed_run

from moedisco_ray.execution.ray.session import NO_DASHBOARD


@pytest.fixture(scope="session")
def undisturbed() -> Path:
    return undisturbed_run()


@pytest.fixture(scope="module")
def ray_cluster(_without_tokens: None) -> None:
    """A local Ray with four CPUs and slots of both pools for all modules; restarted if a test has stopped it."""
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            resources={"low_mem_gpu": 2, "high_mem_gpu": 3},
            include_dashboard=False,
            runtime_env=dict(NO_DASHBOARD),
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=300_000_000,
        )


@pytest.fixture(scope="session")
def _without_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield
        ray.shutdown()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of raylets on this machine, to which a test adds nodes; its head works on nothing."""
    with _raylets() as made:
        yield made


@pytest.fixture(scope="module")
def two_slots() -> Iterator[str]:
    """The address of such a cluster with a node of two slots, for all tests of a module."""
    with _raylets() as made:
        made.add_node(num_cpus=2, resources={"low_mem_gpu": 2}, object_store_memory=80_000_000)
        yield made.address


@contextlib.contextmanager
def _raylets() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.shutdown()  # the shared cluster of other tests, if it is connected
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000},
        )
        ray.init(
            address=cluster.address, runtime_env=dict(NO_DASHBOARD), log_to_driver=False, logging_level=logging.ERROR
        )
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the dashboard of a Ray cluster on this machine with two slots of each pool."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # as in a run that joins a Ray cluster
    ray.shutdown()  # the shared cluster of other tests, if it is connected
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "resources": {"low_mem_gpu": 2, "high_mem_gpu": 2},
            "include_dashboard": True,
            "object_store_memory": 80_000_000,
        },
    )
    joined = ray.init(
        address=cluster.address,
        runtime_env={"env_vars": {"RAY_ADDRESS": cluster.address}},
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield f"http://{joined.dashboard_url}"
    finally:
        ray.shutdown()
        cluster.shutdown()
