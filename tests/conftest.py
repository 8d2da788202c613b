"""What all tests share: no test measures this machine unless it says so."""

import collections
import gc
import os

import pytest
from hypothesis import settings

from moedisco_ray.core.families import PAGES
from moedisco_ray.core.store.artifacts import write_text
from moedisco_ray.plan import machine
from moedisco_ray.plan.speed import Probe, Trial

if "CI" not in os.environ:  # Hypothesis has a profile of its own for CI, without deadlines too
    settings.register_profile("shared machine", deadline=None)
    settings.load_profile("shared machine")

UNLIKE = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
"""Families that differ most: the plainest, normalised heads, latent attention with groups of experts and shared ones,
sinks and transposed weights with biases, and recurrent layers."""
MANY = 10
"""Number of families from which on a test is taken to say the same of every family; one with fewer chose them for a
reason."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark cases of families that are like another one as slow, in tests that have a case for every family.

    With the environment variable `ALL_FAMILIES`, no case is marked: `.ci/run` sets it where a change may reach any
    family. Families of other packages are never marked.
    """
    if os.environ.get("ALL_FAMILIES"):
        return
    ours = {page.FAMILY.name for page in PAGES}
    cases = [item for item in items if hasattr(item, "callspec")]
    named = {item: ours & set(item.callspec.id.split("-")) for item in cases}
    families = collections.defaultdict(set)
    for item in cases:
        families[_test_of(item)] |= named[item]
    for item in cases:
        if named[item] and not named[item] & set(UNLIKE) and len(families[_test_of(item)]) >= MANY:
            item.add_marker(pytest.mark.slow(reason="the family is like one that each run has"))


def _test_of(item):
    return item.nodeid.partition("[")[0]


def pytest_collection_finish():
    """Exclude imported objects from garbage collection, which spent 40 % of the tests' time on them."""
    gc.collect()
    gc.freeze()


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
