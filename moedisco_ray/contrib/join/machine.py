"""The joining machine's side: run Ray through the tunnel, come back when it breaks, and leave without losing work."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel

from moedisco_ray.contrib.join.connection import ENDING_WITH_US, Tunnel, Unreachable, leave, made_keys, tunnel
from moedisco_ray.contrib.join.token import JoinToken, Offer
from moedisco_ray.core.errors import ConfigError, MoeDiscoError
from moedisco_ray.execution.cards import check_cards
from moedisco_ray.execution.node_agent import Drainer, Notice, RayUnavailable
from moedisco_ray.execution.node_agent.raylets import local_raylets

_POLL_SECONDS = 0.5
_END_SECONDS = 20
"""Seconds in which Ray's processes must end after SIGTERM; then they are killed."""
_RULE = 7700
"""Priority of the first routing rule. The number of the routing table is this value plus the tunnel's number."""
_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
"""Pauses before further connections (s); the last one repeats. Up to half of each is left out, at random, so that the
machines of a head that comes back do not all come at once."""
_SETTLED_SECONDS = 30.0
"""Seconds for which Ray must have run to count as started. What ends it later, such as a new head, may pass."""
_SHARED = ("ray", "moedisco-ray")


class LostHead(MoeDiscoError):  # noqa: N818 - an end, which the machine reports
    """The machine was a node of the head's Ray cluster, and is none any more."""


class NotStarted(MoeDiscoError):  # noqa: N818 - an end, too
    """The tunnel's network or Ray cannot start on this machine."""


class Machine(BaseModel, frozen=True):
    """Resources that this machine offers to Ray.

    Attributes:
        tag: Custom resource that marks the pool's nodes.
        slots: Maximum number of workers at the same time.
        gpus: Number of GPUs.
        labels: Labels of the Ray node.
    """

    tag: str
    slots: int
    gpus: int
    labels: Mapping[str, str]

    def arguments(self, ray_address: str, own_address: str) -> list[str]:
        """Arguments of `ray start`. The node offers no CPUs, so that text processing never runs on it."""
        labels = ",".join(f"{name}={value}" for name, value in self.labels.items())
        return [
            "start",
            f"--address={ray_address}",
            f"--node-ip-address={own_address}",
            "--num-cpus=0",
            f"--num-gpus={self.gpus}",
            f"--resources={json.dumps({self.tag: self.slots})}",
            f"--labels={labels}",
            "--disable-usage-stats",
            "--block",
        ]


def own_versions() -> dict[str, str]:
    """This machine's versions of Python and of the packages whose versions must match on all nodes of a Ray cluster."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in _SHARED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def count_gpus() -> int:
    """Number of NVIDIA GPUs of this machine."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--list-gpus"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 - the driver's
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def require_root() -> None:
    """Check that this process can open a tunnel.

    Raises:
        ConfigError: A permission, a device or a tool is missing.
    """
    if os.geteuid() != 0:
        raise ConfigError("moedisco join", None, "needs root to open its tunnel; run it with sudo")
    if not Path("/dev/net/tun").exists():
        raise ConfigError(
            "/dev/net/tun",
            None,
            "does not exist; load the kernel module `tun`, or start the container with --device /dev/net/tun "
            "--cap-add NET_ADMIN",
        )
    missing = [tool for tool in ("ssh", "ip", "setpriv") if shutil.which(tool) is None]
    if missing:
        raise ConfigError("PATH", None, f"has no {', '.join(missing)}; install openssh-client, iproute2 and util-linux")


def join(
    token: JoinToken,
    machine: Machine,
    stop: threading.Event,
    say: Callable[[str], None],
    *,
    grace: float,
    patience: float = math.inf,
) -> None:
    """Run as a node of the head's Ray cluster until `stop` is set, and join again whenever the connection ends.

    Args:
        token: The token; it opens the first connection, and the head then admits a key that this machine makes.
        machine: Resources that the node offers.
        stop: Setting this event drains the node and then ends it.
        say: Receives one line of text per change of state.
        grace: Seconds that work on this machine gets to save its state after `stop` is set.
        patience: Time without the head after which this machine gives up (s).

    Raises:
        ConfigError: torch cannot use one of the GPUs; or the head refuses this machine, has other versions of Python or
            packages, or does not answer the first time.
        NotStarted: The tunnel's network or Ray does not start the first time.
        LostHead: The head was away for too long.
    """
    check_cards("--gpus", machine.gpus)
    with made_keys(token) as keys:
        key, away_since, pauses = keys.token, time.monotonic(), iter(_PAUSES)
        while not stop.is_set():
            try:
                _stay(token, machine, tunnel(token, keys, key), stop, say=say, grace=grace)
                break
            except LostHead as error:
                say(f"{error}; joining again")
                away_since, pauses = time.monotonic(), iter(_PAUSES)
            except (NotStarted, Unreachable) as error:
                if key == keys.token:
                    raise
                if time.monotonic() - away_since >= patience:
                    raise LostHead(
                        f"{token.host} has been away for {patience / 60:g} minutes; to join again, ask for a new token"
                    ) from error
            key = keys.own
            stop.wait(next(pauses, _PAUSES[-1]) * random.uniform(0.5, 1))
    say("left")


def _stay(
    token: JoinToken,
    machine: Machine,
    opening: AbstractContextManager[Tunnel],
    stop: threading.Event,
    say: Callable[[str], None],
    grace: float,
) -> None:
    """Run as a node until `stop` is set, over one connection."""
    with opening as (ssh, offer):
        check_versions(offer.versions, own_versions())
        say(f"connected to {token.host} as {token.own_address}, encrypted; starting Ray")
        os.environ.update(
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": offer.ray_token}
            if offer.ray_token
            else {"RAY_AUTH_MODE": "disabled"}
        )
        with _routed(token, offer), _ray(machine.arguments(offer.ray_address, token.own_address)) as ray:
            say(f"offers {machine.slots} {machine.tag} to {offer.ray_address}; Ctrl-C leaves")
            began = time.monotonic()
            while not stop.wait(_POLL_SECONDS):
                if ssh.poll() is not None:
                    raise LostHead(f"the connection to {token.host} ended")
                if ray.poll() is not None:
                    kind = LostHead if time.monotonic() - began >= _SETTLED_SECONDS else NotStarted
                    raise kind(f"Ray ended with code {ray.returncode}; its logs are in /tmp/ray/session_latest/logs")
            say(f"leaving: work on this machine has {grace:g} s to save its state")
            _drain(offer.ray_address, ray, grace, say)
        leave(ssh)


def check_versions(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Compare the versions of the head with this machine's.

    Raises:
        ConfigError: A version differs.
    """
    for name, wanted in theirs.items():
        if ours.get(name) != wanted:
            raise ConfigError(name, ours.get(name), f"the head has {wanted}; install that version here")


@contextlib.contextmanager
def _routed(token: JoinToken, offer: Offer) -> Iterator[None]:
    """Route all traffic to the head's own address through the tunnel, except the ssh connection that carries it."""
    device, table = f"tun{token.device}", _RULE + token.slot
    _ip(f"address add {token.own_address} peer {token.head_address} dev {device}")
    _ip(f"link set {device} mtu 1400 up")
    _ip(f"route replace {offer.ray_host} dev {device} src {token.own_address} table {table}")
    rules = {
        _RULE: f"to {offer.ray_host} ipproto tcp dport {token.port} lookup main",
        _RULE + 1: f"to {offer.ray_host} lookup {table}",
    }
    with contextlib.ExitStack() as undo:
        for priority, rule in rules.items():
            with contextlib.suppress(NotStarted):  # of an earlier node of this machine that was killed
                _ip(f"rule del pref {priority}")
            _ip(f"rule add pref {priority} {rule}")
            undo.callback(_ip, f"rule del pref {priority}")
        yield


def _ip(command: str) -> None:
    words = ["ip", *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - iproute2
    if done.returncode:
        raise NotStarted(f"ip {command}: {done.stderr.strip()}")


@contextlib.contextmanager
def _ray(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    ray = subprocess.Popen(  # noqa: S603 - Ray's own command line
        [*ENDING_WITH_US, sys.executable, "-P", "-m", "ray.scripts.scripts", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield ray
    finally:
        ray.terminate()
        try:
            ray.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(ray.pid, signal.SIGKILL)
            ray.wait()


def _drain(ray_address: str, ray: subprocess.Popen[bytes], grace: float, say: Callable[[str], None]) -> None:
    """Drain this machine's Ray node, and wait until it is idle and ends, or until the grace time is over."""
    deadline = time.time() + grace
    drain = Drainer(find=lambda _only: [each for each in local_raylets() if each.gcs_address == ray_address])
    try:
        drain(Notice("end", deadline, "the machine leaves"))
    except RayUnavailable as error:
        say(f"not drained: {error}")
        return
    while time.time() < deadline and ray.poll() is None:
        time.sleep(_POLL_SECONDS)
