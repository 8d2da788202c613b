"""This machine's Ray nodes, and how they are drained: by a process of its own, without Ray in this one.

Ray's client ends its process when the cluster is out of reach for a minute, which must not end the agent; and an agent
that waits for days should hold a few megabytes rather than a hundred.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.execution.node_agent.metadata import Notice

_DRAIN_SECONDS = 20.0
_LEAST_SECONDS = 1.0
"""Ahead of now; Ray takes a deadline in the past for none."""


class RayAway(MoeDiscoError):  # noqa: N818 - a state, met at every boot
    """No Ray node of this machine could be drained; try again."""


@dataclasses.dataclass(frozen=True)
class Raylet:
    """A Ray node of this machine.

    Attributes:
        node_id: Its id, in hexadecimal digits.
        gcs_address: HOST:PORT of its cluster's control store.
    """

    node_id: str
    gcs_address: str


def local_raylets(only: str | None = None) -> list[Raylet]:
    """The Ray nodes that run on this machine, as their command lines tell.

    Args:
        only: The id of the one that is meant; None: all of them, for they end together.
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
        RayAway: The cluster did not take it in time.
    """
    deadline = max(notice.deadline, time.time() + _LEAST_SECONDS)
    command = [
        sys.executable, "-m", "moedisco_ray.execution.ray.autoscaling.draining",
        raylet.gcs_address, raylet.node_id, str(int(deadline * 1000)),
        notice.reason]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_DRAIN_SECONDS)  # noqa: S603 - ours
    except subprocess.TimeoutExpired as error:
        raise RayAway(f"Ray at {raylet.gcs_address} does not answer") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise RayAway(f"Ray at {raylet.gcs_address}: {lines[-1]}")


class Drainer:
    """Drains each of this machine's Ray nodes once.

    Args:
        only: The id of the node that is meant; None: all of them.
        find: Finds them.
        run: Drains one.
    """

    def __init__(
        self, only: str | None = None, find: Callable[[str | None], Sequence[Raylet]] = local_raylets,
        run: Callable[[Raylet, Notice], None] = run_drain,
    ) -> None:
        self._only = only
        self._find = find
        self._run = run
        self._done: set[Raylet] = set()

    def __call__(self, notice: Notice) -> list[str]:
        """Drain what is not drained yet.

        Raises:
            RayAway: No node runs here, or one could not be drained; the others are.
        """
        found = self._find(self._only)
        if not found and not self._done:
            raise RayAway("no Ray node runs on this machine")
        drained, away = [], None
        for raylet in found:
            if raylet in self._done:
                continue
            try:
                self._run(raylet, notice)
            except RayAway as error:
                away = error
            else:
                self._done.add(raylet)
                drained.append(raylet.node_id)
        if away is not None:
            raise away
        return drained
