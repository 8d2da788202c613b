"""Facts about this machine for a plan: a cached speed probe, and the size of local text. Imports no heavy library.

The probe is stored in `MOEDISCO_CACHE_DIR`, by default `moedisco` in the user's cache directory.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.globs import Glob
from moedisco_ray.core.limits import COMPRESSED, PARQUET, TEXT_PER_COMPRESSED
from moedisco_ray.core.store.artifacts import write_text
from moedisco_ray.core.store.locations import cache_directory, is_uri
from moedisco_ray.plan.speed import Machine, Probe

_LIBRARIES = ("moedisco-ray", "torch", "transformers", "tokenizers")
_PROBE_SECONDS = 120.0
_EMBEDDED_BYTES = 10_000_000
"""Size of the embedded corpus (bytes); 9.8 MB were measured with the pinned libraries."""
_MOST_FILES = 10_000
"""Maximum number of files and folders below a source's folder; with more, the size of its text is unknown."""


def known_machine(config: RunConfig, *, here: bool, read_sizes: bool = False) -> Machine:
    """Facts about the machine that are known without a new measurement.

    Args:
        config: The run's configuration.
        here: Whether workers without GPUs run on this machine's cores.
        read_sizes: Whether the sizes of local sources may be read.
    """
    return Machine(probe=_cached() if here else None, text_bytes=_text_bytes(config, read_sizes))


def measured_machine(config: RunConfig, *, here: bool) -> Machine:
    """Facts about the machine. If a pool has no GPUs, the speed of the cores is measured unless it is cached.

    Args:
        config: The run's configuration.
        here: Whether workers without GPUs run on this machine's cores.
    """
    if here and not all(pool.gpu for pool, _ in config.needed_pools):
        measure()
    return known_machine(config, here=here, read_sizes=True)


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


def _text_bytes(config: RunConfig, read_sizes: bool) -> int | None:
    total = 0
    for source in config.corpus.of_owner(None).values():
        if source.path == "embedded":
            total += _EMBEDDED_BYTES
            continue
        size = text_size(source.path) if read_sizes and not is_uri(source.path) else None
        if not size:
            return None
        total += size
    return total


def text_size(path: str) -> int | None:
    """Estimated size of the text of a file, a folder or a glob on this machine (bytes).

    Returns:
        The size; 0 if there are no files, or only empty ones, and None if there are too many to count.

    Raises:
        GlobError: The path is no glob.
    """
    found = Path(path).absolute()
    wildcard = min((path.index(sign) for sign in "*?[" if sign in path), default=None)
    if wildcard is None or found.is_dir():
        base, pattern = found, None
    else:
        base, pattern = Path(path[:wildcard] + "_").absolute().parent, Glob.of(str(found))
    seen = [base] if base.is_file() else list(itertools.islice(_below(base), _MOST_FILES + 1))
    files = [each for each in seen if each.is_file() and (pattern is None or pattern.matches(str(each)))]
    if len(seen) > _MOST_FILES:
        return None
    return sum(map(_text_of_file, files))


def _text_of_file(file: Path) -> int:
    """Estimated size of the text in a file (bytes)."""
    return file.stat().st_size * (TEXT_PER_COMPRESSED if file.name.endswith((*COMPRESSED, *PARQUET)) else 1)


def _below(folder: Path) -> Iterator[Path]:
    """Everything below a folder."""
    for home, folders, files in os.walk(folder, followlinks=True):
        yield from (Path(home, name) for name in (*folders, *files))
