"""Facts about this machine for a plan, among them a cached speed probe. Imports no heavy library.

The probe is stored in `MOEDISCO_CACHE_DIR`, by default `moedisco` in the user's cache directory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.store.artifacts import write_text
from moedisco_ray.core.store.locations import cache_directory
from moedisco_ray.plan.speed import Machine, Probe
from moedisco_ray.plan.text_size import Lister, corpus_bytes

_LIBRARIES = ("moedisco-ray", "torch", "transformers", "tokenizers")
_PROBE_SECONDS = 120.0


def known_machine(config: RunConfig, *, here: bool, listed: Lister | None = None) -> Machine:
    """Facts about the machine that are known without a new measurement.

    Args:
        config: The run's configuration.
        here: Whether workers without GPUs run on this machine's cores.
        listed: Function that lists the files of local sources; None: they may not be read.
    """
    return Machine(probe=_cached() if here else None, text_bytes=corpus_bytes(config, listed))


def measured_machine(config: RunConfig, *, here: bool, listed: Lister | None = None) -> Machine:
    """Facts about the machine. If a pool has no GPUs, the speed of the cores is measured unless it is cached.

    Args:
        config: The run's configuration.
        here: Whether workers without GPUs run on this machine's cores.
        listed: Function that lists the files of local sources; None: they may not be read.
    """
    if here and not all(pool.gpu for pool, _ in config.needed_pools):
        measure()
    return known_machine(config, here=here, listed=listed)


def measure() -> Probe | None:
    """Return the cached speed probe, or else run a new probe and cache it; None if that fails."""
    found = _cached()
    if found is not None:
        return found
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "moedisco_ray.execution.probe"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            env=environment,
        )
        probe = Probe.model_validate_json(done.stdout)
        path = probe_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, probe.model_dump_json(indent=2) + "\n")
    except (OSError, subprocess.SubprocessError, ValidationError):
        return None
    return probe


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the packages that a probe depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cached() -> Probe | None:
    try:
        return Probe.model_validate_json(probe_path().read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def probe_path() -> Path:
    key = json.dumps([library_versions(), len(os.sched_getaffinity(0)), os.uname().machine], sort_keys=True)
    return cache_directory() / f"probe-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
