"""What all tests share: no test measures this machine unless it says so."""

import gc
import os

import pytest
from hypothesis import settings

from moedisco_ray.core.artifacts import write_text
from moedisco_ray.plan import machine
from moedisco_ray.plan.speed import Probe, Trial

if "CI" not in os.environ:      # Hypothesis has a profile of its own for CI, without deadlines too
    settings.register_profile("shared machine", deadline=None)
    settings.load_profile("shared machine")


def pytest_collection_finish():
    """Take what is imported out of garbage collection: looking through it again and again took 40 % of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _known_speed(tmp_path_factory):
    """A probe of a machine that never changes, where `plan` and the service look for this machine's."""
    probe = Probe(
        cores=2, versions={}, start_up_seconds=4.0, text_bytes_per_second=1e6,
        trials=tuple(
            Trial(experts=experts, flops_per_token=size, flops_per_second=rate)
            for experts in (1, 4) for size, rate in ((1e6, 20e9), (1e7, 60e9))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        write_text(machine._path(), probe.model_dump_json())
        yield
