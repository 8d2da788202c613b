from __future__ import annotations

from pathlib import Path

import pytest
from small_run import small_config

from moedisco_ray import pipeline
from moedisco_ray.in_process import InProcess


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run in one plain process, which other ways of running it are held against. To be read, not written."""
    return pipeline.run(small_config(tmp_path_factory.mktemp("undisturbed")), shell=InProcess())
