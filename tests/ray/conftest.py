from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four CPUs and slots of both pools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local", num_cpus=4, resources={"low_mem_gpu": 2, "high_mem_gpu": 3}, include_dashboard=False,
            log_to_driver=False, logging_level=logging.ERROR, object_store_memory=300_000_000)
        yield
        ray.shutdown()
