"""The ssh connection of a joining machine, which carries the tunnel.

The token opens the first connection. The machine sends the head a key of its own through it, which opens all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.contrib.join.token import JoinToken, Offer
from moedisco_ray.core.errors import ConfigError

_CONNECT_SECONDS = 15
"""Timeout for connecting to the head, in seconds."""
_LEAVE_SECONDS = 5
"""Seconds in which the head should end the connection of a machine that leaves."""
ENDING_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")
"""Words before a command that must end when this process is killed: a Ray node without it would offer its slots a
second time after the next `moedisco join`."""
_HOST_ALIAS = "moedisco-head"
_REFUSED = "Permission denied"
_MEANINGS = (
    (_REFUSED, "TOKEN", "the head refuses it: it was used before, or another head issued it; ask for a new one"),
    (
        "Host key verification failed",
        "TOKEN",
        "another machine than the head that issued it answers there; ask for a new one",
    ),
    ("Tunnel device open failed", "/dev/net/tun", "no tunnel can be opened; this machine needs root and CAP_NET_ADMIN"),
)
"""Messages of ssh, each with field and remedy of the error to raise. After any other message, the head was not
reached."""
_FORGOTTEN = "the head no longer admits this machine, which was revoked or away for days; ask for a new token"
_IN_USE = "Tunnel forwarding failed"
"""What ssh says while the head still holds the machine's earlier connection, or another machine has its tunnel."""

Tunnel = tuple[subprocess.Popen[str], Offer]
"""The ssh process of an open tunnel, and what the head offers through it."""


class Unreachable(ConfigError):  # noqa: N818 - it may pass
    """The head does not answer now."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """Files of the keys with which a machine connects.

    Attributes:
        token: The token's key.
        certificate: The token's certificate of this key.
        own: The key that this machine has made.
        known_hosts: The head's public key.
    """

    token: Path
    certificate: Path
    own: Path
    known_hosts: Path

    @property
    def own_public(self) -> str:
        """The public half of the machine's own key, as base64."""
        return Path(f"{self.own}.pub").read_text(encoding="utf-8").split()[1]


@contextlib.contextmanager
def made_keys(token: JoinToken) -> Iterator[Keys]:
    """The keys of a machine until the block ends: the token's, and a new one."""
    with tempfile.TemporaryDirectory() as scratch:
        keys = Keys(*(Path(scratch) / name for name in ("token", "certificate", "own", "known")))
        for path, text in (
            (keys.token, token.key),
            (keys.certificate, token.certificate),
            (keys.known_hosts, f"{_HOST_ALIAS} {token.host_key}\n"),
        ):
            path.touch(mode=0o600)
            path.write_text(text, encoding="utf-8")
        new_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys.own)]
        subprocess.run(new_key, check=True)  # noqa: S603 - OpenSSH's
        yield keys


@contextlib.contextmanager
def tunnel(token: JoinToken, keys: Keys, key: Path) -> Iterator[Tunnel]:
    """Open a tunnel to the head with one of the keys, until the block ends.

    Raises:
        Unreachable: The head does not answer, or holds the machine's last connection for some seconds more.
        ConfigError: The head refuses the key, or this machine can open no tunnel.
    """
    first = key == keys.token
    options = {
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "BatchMode": "yes",
        "UserKnownHostsFile": keys.known_hosts,
        "StrictHostKeyChecking": "yes",
        "HostKeyAlias": _HOST_ALIAS,
        "GlobalKnownHostsFile": "/dev/null",
        "ExitOnForwardFailure": "yes",
        "ConnectTimeout": _CONNECT_SECONDS,
        "ServerAliveInterval": 10,
        "ServerAliveCountMax": 3,
        "Tunnel": "point-to-point",
    } | ({"CertificateFile": keys.certificate} if first else {})
    command = [
        "ssh",
        "-F",
        "none",
        "-T",
        "-i",
        str(key),
        "-p",
        str(token.port),
        "-w",
        f"{token.device}:{token.device}",
        *(f"-o{name}={value}" for name, value in options.items()),
        f"{token.user}@{token.host}",
    ]
    # A separate session, so that Ctrl-C does not end the tunnel before Ray has left the cluster through it.
    ssh = subprocess.Popen(  # noqa: S603 - ssh with our own arguments
        [*ENDING_WITH_US, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if first:
            _send(ssh, f"key {keys.own_public}")
        yield ssh, _read_offer(ssh, token, first=first)
    finally:
        ssh.terminate()
        ssh.communicate()


def leave(ssh: subprocess.Popen[str]) -> None:
    """Let the head know that this machine does not come back, and wait for the end of the connection."""
    _send(ssh, "leave")
    with contextlib.suppress(BrokenPipeError):
        if ssh.stdin is not None:
            ssh.stdin.close()
            ssh.stdin = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        ssh.wait(_LEAVE_SECONDS)


def _send(ssh: subprocess.Popen[str], line: str) -> None:
    if ssh.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # its end is found elsewhere
            ssh.stdin.write(f"{line}\n")
            ssh.stdin.flush()


def _read_offer(ssh: subprocess.Popen[str], token: JoinToken, *, first: bool) -> Offer:
    line = "" if ssh.stdout is None else ssh.stdout.readline()
    try:
        return Offer.model_validate_json(line)
    except ValidationError as error:
        ssh.terminate()
        _, stderr = ssh.communicate()
        raise explain(stderr, token, first=first) from error


def explain(stderr: str, token: JoinToken, *, first: bool = True) -> ConfigError:
    """The error to raise for an ssh process that ended before it received the head's offer.

    Args:
        stderr: Output of ssh.
        token: The machine's token.
        first: Whether the token opens the connection; otherwise the machine's own key does.
    """
    if _REFUSED in stderr and not first:
        return ConfigError("TOKEN", None, _FORGOTTEN)
    for sign, field, remedy in _MEANINGS:
        if sign in stderr:
            return ConfigError(field, None, remedy)
    if _IN_USE in stderr:
        return Unreachable("TOKEN", None, "its tunnel is in use on the head; ask for a new one")
    lines = [line for line in stderr.strip().splitlines() if line] or ["no reason given"]
    return Unreachable(
        "TOKEN",
        f"{token.host}:{token.port}",
        f"the head does not answer there ({lines[-1].strip()}); check that it runs "
        "`moedisco join-gateway` and that its firewall lets this machine in",
    )
