"""The GPUs and the main memory of this machine, found without torch, whose import takes seconds."""

from __future__ import annotations

import os
import subprocess

from moedisco_ray.core.config.presets import LocalCard

_SECONDS = 20.0
"""Seconds that `nvidia-smi` may take (s); next to a broken card it may never answer."""
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


def local_cards() -> tuple[LocalCard, ...]:
    """The NVIDIA GPUs of this machine; empty if `nvidia-smi` is not installed, fails or does not answer."""
    try:
        done = subprocess.run(  # noqa: S603 - a constant
            _QUERY, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.rpartition(",") for line in done.stdout.splitlines())
    return tuple(
        LocalCard(name.strip(), int(mebibytes) / 1024) for name, _, mebibytes in rows if mebibytes.strip().isdigit()
    )


def host_memory_gb() -> float:
    """Main memory of this machine (GiB)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
