"""The joining machine's side: open the tunnel, run Ray through it, and leave the cluster without losing work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ValidationError

from moedisco_ray.contrib.join.token import JoinToken, Offer
from moedisco_ray.core.errors import ConfigError, MoeDiscoError
from moedisco_ray.execution.cards import check_cards
from moedisco_ray.execution.node_agent import Drainer, Notice, RayUnavailable
from moedisco_ray.execution.node_agent.raylets import local_raylets

_CONNECT_SECONDS = 15
"""Timeout for connecting to the head, in seconds."""
_POLL_SECONDS = 0.5
_END_SECONDS = 20
"""Seconds in which Ray's processes must end after SIGTERM; then they are killed."""
_RULE = 7700
"""Priority of the first routing rule. The number of the routing table is this value plus the tunnel's number."""
_ENDING_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")
"""Words before a command that must end when this process is killed: a Ray node without it would offer its slots a
second time after the next `moedisco join`."""
_SHARED = ("ray", "moedisco-ray")
_MEANINGS = (
    (
        "Permission denied",
        "TOKEN",
        "the head refuses it: it was used before, or another head issued it; ask for a new one",
    ),
    (
        "Host key verification failed",
        "TOKEN",
        "another machine than the head that issued it answers there; ask for a new one",
    ),
    ("Tunnel device open failed", "/dev/net/tun", "no tunnel can be opened; this machine needs root and CAP_NET_ADMIN"),
    ("Tunnel forwarding failed", "TOKEN", "its tunnel is in use on the head; ask for a new one"),
)
"""Messages of ssh, each with field and remedy of the error to raise. After any other message, the head was not
reached."""


class LostHead(MoeDiscoError):  # noqa: N818 - an end, which the machine reports
    """The connection to the head ended, or Ray ended on this machine."""


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
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)  # noqa: S607 - the driver's
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
    token: JoinToken, machine: Machine, stop: threading.Event, say: Callable[[str], None], *, grace: float
) -> None:
    """Run as a node of the head's Ray cluster until `stop` is set.

    Args:
        token: The token; it can be used only once.
        machine: Resources that the node offers.
        stop: Setting this event drains the node and then ends it.
        say: Receives one line of text per change of state.
        grace: Seconds that work on this machine gets to save its state after `stop` is set.

    Raises:
        ConfigError: torch cannot use one of the GPUs; or the head refuses the token, does not answer, or has other
            versions of Python or packages.
        LostHead: The connection to the head ended, or Ray ended on this machine.
    """
    check_cards("--gpus", machine.gpus)
    with _tunnel(token) as (ssh, offer):
        check_versions(offer.versions, own_versions())
        say(f"connected to {token.host} as {token.own_address}, encrypted; starting Ray")
        os.environ.update(
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": offer.ray_token}
            if offer.ray_token
            else {"RAY_AUTH_MODE": "disabled"}
        )
        with _routed(token, offer), _ray(machine.arguments(offer.ray_address, token.own_address)) as ray:
            say(f"offers {machine.slots} {machine.tag} to {offer.ray_address}; Ctrl-C leaves")
            while not stop.wait(_POLL_SECONDS):
                if ssh.poll() is not None:
                    raise LostHead(f"the connection to {token.host} ended; to join again, ask for a new token")
                if ray.poll() is not None:
                    raise LostHead(
                        f"Ray ended with code {ray.returncode}; its logs are in /tmp/ray/session_latest/logs"
                    )
            say(f"leaving: work on this machine has {grace:g} s to save its state")
            _drain(offer.ray_address, ray, grace, say)
    say("left")


def check_versions(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Compare the versions of the head with this machine's.

    Raises:
        ConfigError: A version differs.
    """
    for name, wanted in theirs.items():
        if ours.get(name) != wanted:
            raise ConfigError(name, ours.get(name), f"the head has {wanted}; install that version here")


def explain(stderr: str, token: JoinToken) -> ConfigError:
    """The error to raise for an ssh process that ended before it received the head's offer."""
    for sign, field, remedy in _MEANINGS:
        if sign in stderr:
            return ConfigError(field, None, remedy)
    lines = [line for line in stderr.strip().splitlines() if line] or ["no reason given"]
    return ConfigError(
        "TOKEN",
        f"{token.host}:{token.port}",
        f"the head does not answer there ({lines[-1].strip()}); check that it runs "
        "`moedisco join-gateway` and that its firewall lets this machine in",
    )


@contextlib.contextmanager
def _tunnel(token: JoinToken) -> Iterator[tuple[subprocess.Popen[str], Offer]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, text in (
            ("key", token.key),
            ("certificate", token.certificate),
            ("known", f"moedisco-head {token.host_key}\n"),
        ):
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(text, encoding="utf-8")
        options = {
            "CertificateFile": folder / "certificate",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "UserKnownHostsFile": folder / "known",
            "StrictHostKeyChecking": "yes",
            "HostKeyAlias": "moedisco-head",
            "GlobalKnownHostsFile": "/dev/null",
            "ExitOnForwardFailure": "yes",
            "ConnectTimeout": _CONNECT_SECONDS,
            "ServerAliveInterval": 10,
            "ServerAliveCountMax": 3,
            "Tunnel": "point-to-point",
        }
        command = [
            "ssh",
            "-F",
            "none",
            "-T",
            "-i",
            str(folder / "key"),
            "-p",
            str(token.port),
            "-w",
            f"{token.device}:{token.device}",
            *(f"-o{name}={value}" for name, value in options.items()),
            f"{token.user}@{token.host}",
        ]
        # A separate session, so that Ctrl-C does not end the tunnel before Ray has left the cluster through it.
        ssh = subprocess.Popen(  # noqa: S603 - ssh with our own arguments
            [*_ENDING_WITH_US, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield ssh, _read_offer(ssh, token)
        finally:
            ssh.terminate()
            ssh.communicate()


def _read_offer(ssh: subprocess.Popen[str], token: JoinToken) -> Offer:
    line = "" if ssh.stdout is None else ssh.stdout.readline()
    try:
        return Offer.model_validate_json(line)
    except ValidationError as error:
        ssh.terminate()
        _, stderr = ssh.communicate()
        raise explain(stderr, token) from error


@contextlib.contextmanager
def _routed(token: JoinToken, offer: Offer) -> Iterator[None]:
    """Route all traffic to the head's own address through the tunnel, except the ssh connection that carries it."""
    device, table = f"tun{token.device}", _RULE + token.slot
    _ip(f"address add {token.own_address} peer {token.head_address} dev {device}")
    _ip(f"link set {device} mtu 1400 up")
    _ip(f"route replace {offer.ray_host} dev {device} src {token.own_address} table {table}")
    rules = (
        f"pref {_RULE} to {offer.ray_host} ipproto tcp dport {token.port} lookup main",
        f"pref {_RULE + 1} to {offer.ray_host} lookup {table}",
    )
    with contextlib.ExitStack() as undo:
        for rule in rules:
            with contextlib.suppress(LostHead):  # of an earlier node of this machine that was killed
                _ip(f"rule del {rule}")
            _ip(f"rule add {rule}")
            undo.callback(_ip, f"rule del {rule}")
        yield


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)  # noqa: S603, S607 - iproute2
    if done.returncode:
        raise LostHead(f"ip {command}: {done.stderr.strip()}")


@contextlib.contextmanager
def _ray(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    ray = subprocess.Popen(  # noqa: S603 - Ray's own command line
        [*_ENDING_WITH_US, sys.executable, "-P", "-m", "ray.scripts.scripts", *arguments],
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
