"""A second node of the shared cluster, for a while."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import ray
from waiting import until


@contextlib.contextmanager
def second_node(tag: str, slots: int = 1) -> Iterator[None]:
    """It alone offers the tag, and is gone after the block."""
    address = ray.get_runtime_context().gcs_address
    node = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            f"--address={address}",
            f"--num-cpus={slots}",
            "--block",
            "--object-store-memory=80000000",
            f'--resources={{"{tag}": {slots}}}',
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: tag in ray.cluster_resources())
        yield
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(timeout=30)
    until(lambda: tag not in ray.cluster_resources())
