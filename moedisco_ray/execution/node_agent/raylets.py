"""Find and drain this machine's Ray nodes.

The drain runs in a subprocess, so that the agent itself does not import Ray.

Ray's client ends its process when the Ray cluster is out of reach for a minute, which must not end the agent. And an
agent that waits for days needs only a few megabytes of memory without Ray, and a hundred with it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.execution.clouds.metadata import Notice

DRAIN_SECONDS = 20.0
_MIN_SECONDS_AHEAD = 1.0
"""Minimum time from now to a deadline, in seconds: Ray ignores a deadline in the past."""


class RayUnavailable(MoeDiscoError):  # noqa: N818 - a normal state while a machine boots
    """A Ray node of this machine could not be drained; try again."""


@dataclasses.dataclass(frozen=True)
class Raylet:
    """A Ray node of this machine.

    Attributes:
        node_id: The node's id (hexadecimal).
        gcs_address: HOST:PORT of the Ray cluster's control store.
    """

    node_id: str
    gcs_address: str


def local_raylets(only: str | None = None) -> list[Raylet]:
    """The Ray nodes that run on this machine, read from their command lines.

    Args:
        only: Id of the only node to return; None for all nodes, because they end together.
    """
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != "raylet":
            continue
        pairs = [argument.partition("=") for argument in process.info["cmdline"] or ()]
        flags = {flag.lstrip("-").replace("_", "-"): value for flag, _, value in pairs}
        if flags.get("node-id") and flags.get("gcs-address") and only in (None, flags["node-id"]):
            found.append(Raylet(flags["node-id"], flags["gcs-address"]))
    return found


def run_drain(raylet: Raylet, notice: Notice) -> None:
    """Drain one node.

    Raises:
        RayUnavailable: The Ray cluster did not accept the drain in time.
    """
    deadline = max(notice.deadline, time.time() + _MIN_SECONDS_AHEAD)
    command = [
        sys.executable,
        "-P",
        "-m",
        "moedisco_ray.execution.ray.autoscaling.draining",
        raylet.gcs_address,
        raylet.node_id,
        str(int(deadline * 1000)),
        notice.reason,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DRAIN_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise RayUnavailable(f"Ray at {raylet.gcs_address} does not answer") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise RayUnavailable(f"Ray at {raylet.gcs_address}: {lines[-1]}")


class Drainer:
    """Drains each of this machine's Ray nodes once.

    Args:
        only: Id of the only node to drain; None for all nodes.
        find: Returns the Ray nodes of this machine.
        run: Drains one node.
    """

    def __init__(
        self,
        only: str | None = None,
        find: Callable[[str | None], Sequence[Raylet]] = local_raylets,
        run: Callable[[Raylet, Notice], None] = run_drain,
    ) -> None:
        self._only = only
        self._find = find
        self._run = run
        self._done: set[Raylet] = set()

    def __call__(self, notice: Notice) -> list[str]:
        """Drain the nodes that are not drained yet, and return their ids.

        Raises:
            RayUnavailable: No node runs here, or one of them could not be drained.
        """
        found = self._find(self._only)
        if not found and not self._done:
            raise RayUnavailable("no Ray node runs on this machine")
        drained, failure = [], None
        for raylet in found:
            if raylet in self._done:
                continue
            try:
                self._run(raylet, notice)
            except RayUnavailable as error:
                failure = error
            else:
                self._done.add(raylet)
                drained.append(raylet.node_id)
        if failure is not None:
            raise failure
        return drained
