"""What all tests share: no test measures this machine unless it says so."""

import collections
import ctypes
import gc
import os

import pytest
from drawn import examples
from hypothesis import settings

from moedisco_ray.core.families import PAGES
from moedisco_ray.core.store.artifacts import write_text
from moedisco_ray.plan import machine
from moedisco_ray.plan.speed import Probe, Trial

if "CI" not in os.environ:  # Hypothesis has a profile of its own for CI, without deadlines too
    settings.register_profile("shared machine", deadline=None, max_examples=examples(25, 100))
    settings.load_profile("shared machine")

ON_BOTH = ("test_database_", "test_ingest", "test_quotas")
"""Beginnings of the names of files whose tests are about the database itself: they run on each kind each time."""
ALSO_ON_BOTH = (
    "test_backups",
    "test_datasets",
    "test_leases",
    "test_notices",
    "test_projects",
    "test_reconciler",
    "test_retention",
    "test_run_list",
    "test_secrets",
    "test_two_",
)
"""Beginnings of the names of files with queries of their own, which `make test-slow` runs on PostgreSQL too; the other
files ask through routes whose queries these have."""
UNLIKE = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
"""Families that differ most: the plainest, normalised heads, latent attention with groups of experts and shared ones,
sinks and transposed weights with biases, and recurrent layers."""
MANY = 10
"""Number of families from which on a test is taken to say the same of every family; one with fewer chose them for a
reason."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark cases that repeat what another case shows.

    These are cases of families that are like another one, in tests that have a case for every family, and cases on
    PostgreSQL, outside tests of the database: most of them are left out. Families of other packages are never marked.
    """
    ours = {page.FAMILY.name for page in PAGES}
    cases = [item for item in items if hasattr(item, "callspec")]
    named = {item: ours & set(item.callspec.id.split("-")) for item in cases}
    families = collections.defaultdict(set)
    for item in cases:
        families[_test_of(item)] |= named[item]
    for item in cases:
        if named[item] and not named[item] & set(UNLIKE) and len(families[_test_of(item)]) >= MANY:
            item.add_marker(pytest.mark.families)
    for item in cases:
        if "postgresql" in item.callspec.id.split("-") and not item.path.name.startswith(ON_BOTH):
            item.add_marker(pytest.mark.slow)
            if not item.path.name.startswith(ALSO_ON_BOTH):
                items.remove(item)


def _test_of(item):
    return item.nodeid.partition("[")[0]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Exclude imported objects from garbage collection, which took 40 % of the tests' time and 28 % of the imports'."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _freed_memory():
    """Return a module's memory to the operating system: after a training, the C library keeps what is freed."""
    yield
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@pytest.fixture(scope="session", autouse=True)
def _known_speed(tmp_path_factory):
    """A probe of a machine that never changes, where `plan` and the service look for this machine's."""
    probe = Probe(
        cores=2,
        versions={},
        start_up_seconds=4.0,
        text_bytes_per_second=1e6,
        trials=tuple(
            Trial(experts=experts, flops_per_token=size, flops_per_second=rate)
            for experts in (1, 4)
            for size, rate in ((1e6, 20e9), (1e7, 60e9))
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        write_text(machine.probe_path(), probe.model_dump_json())
        yield
