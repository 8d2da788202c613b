"""The head's side of joining: a separate sshd that only opens tunnels, and the tokens for it. All of it runs as root.

The files are in a directory that only root may write to, because sshd requires this of the commands that it runs:

    ca, host, *.pub     keys that sign tokens and identify the head
    sshd_config         allows nothing but a layer-3 tunnel and the forced command
    admit.sh            refuses a certificate that an earlier connection used
    known.sh            admits the key that a machine made for itself when it joined
    offer.sh            the forced command: prints offer.json and waits for the end of the connection
    used/               one file per serial number of a used certificate; the unprivileged user of the sshd writes it
    machines/           per tunnel, the key of the machine that joined with it, and the process that serves its
                        connection; that user writes them. A key's file is as old as the machine's last connection
    slots/              one file per tunnel: serial number and expiry of its newest token
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from moedisco_ray.contrib.join.gateway_files import gateway_files
from moedisco_ray.contrib.join.token import JoinToken, Offer, address, device_name
from moedisco_ray.core.errors import ConfigError

USER = "moedisco-join"
SSHD = "/usr/sbin/sshd"
_CLOCK_SKEW = 300
"""Seconds by which a certificate's validity begins before its issue, because the head's clock may be set back after the
issue."""


class Gateway(BaseModel, frozen=True):
    """Settings of the head's sshd for joining machines."""

    host: str
    """Name or address at which machines reach the head."""
    port: Annotated[int, Field(ge=1, le=65535)]
    network: str
    """IP network from which the tunnels get their addresses, such as 10.97.0.0/16."""
    machines: Annotated[int, Field(ge=1, le=1000)]
    """Maximum number of joined machines at the same time."""


def prepare(directory: Path, gateway: Gateway, offer: Offer) -> None:
    """Write the sshd's files, and create its user and tunnel devices. Existing keys and issued tokens stay valid.

    Raises:
        ConfigError: This process is not root, a tool is missing, or the network has too few addresses.
    """
    _require_root("join-gateway")
    if not Path(SSHD).exists():
        raise ConfigError(SSHD, None, "does not exist; install openssh-server")
    check_network(gateway)
    _require_tools("ip", "ssh-keygen", "useradd")
    _make_user()
    user = pwd.getpwnam(USER)
    directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    for name in ("used", "slots", "machines"):
        (directory / name).mkdir(exist_ok=True, mode=0o700)
    for name in ("used", "machines"):
        os.chown(directory / name, user.pw_uid, user.pw_gid)
    for name in ("ca", "host"):
        if not (directory / name).exists():
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"moedisco {name}", "-f", str(directory / name)])
    for name, (text, mode) in gateway_files(directory, USER, gateway.port).items():
        _write(directory / name, text, mode)
    with (directory / "sshd_config").open("a", encoding="utf-8") as config:
        config.write(_without_penalties(directory))
    _write(directory / "offer.json", offer.model_dump_json(), 0o640)
    os.chown(directory / "offer.json", 0, user.pw_gid)
    _write(directory / "gateway.json", gateway.model_dump_json(), 0o644)
    _forget_old(directory / "used")
    _make_devices(gateway)


def check_network(gateway: Gateway) -> None:
    """Check that the network has an address for every tunnel.

    Raises:
        ConfigError: The network is not valid, or too small.
    """
    try:
        address(gateway.network, gateway.machines)
    except (ValueError, IndexError) as error:
        raise ConfigError(
            "--network",
            gateway.network,
            f"is no IPv4 network with addresses for {gateway.machines} machines; give one such as "
            "10.97.0.0/16 that no other network uses",
        ) from error


def serve(directory: Path) -> None:
    """Replace this process with the sshd that accepts joining machines."""
    Path("/run/sshd").mkdir(exist_ok=True)
    os.execv(SSHD, [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")])  # noqa: S606 - not a shell


def issue(directory: Path, minutes: int, now: float | None = None) -> JoinToken:
    """Issue a token for a free tunnel.

    Args:
        directory: Directory with the files that `prepare` wrote.
        minutes: Time for which the token can open a connection (min).
        now: Current Unix time; by default, the clock is read.

    Raises:
        ConfigError: This process is not root, no gateway was prepared, or every tunnel has a machine or an unused
            token.
    """
    gateway = _prepared(directory)
    now = time.time() if now is None else now
    serial = secrets.randbits(63)
    with _locked(directory):
        free = [slot for slot in range(1, gateway.machines + 1) if _is_free(directory, slot, now)]
        if not free:
            raise ConfigError(
                "--machines",
                gateway.machines,
                "every tunnel has a machine or an unused token; start the gateway with more",
            )
        slot = min(free, key=lambda slot: _last_seen(directory, slot))
        (directory / "machines" / str(slot)).unlink(missing_ok=True)
        _write(directory / "slots" / str(slot), json.dumps({"serial": serial, "expires": now + 60 * minutes}), 0o600)
    with tempfile.TemporaryDirectory() as scratch:
        key = Path(scratch) / "key"
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"join-{slot}", "-f", str(key)])
        _run(
            [
                "ssh-keygen",
                "-q",
                "-s",
                str(directory / "ca"),
                "-I",
                f"join-{slot}",
                "-n",
                "join",
                "-z",
                str(serial),
                "-V",
                f"{_utc(now - _CLOCK_SKEW)}:{_utc(now + 60 * minutes)}",
                "-O",
                "clear",
                "-O",
                f"force-command={directory}/offer.sh",
                f"{key}.pub",
            ]
        )
        return JoinToken(
            host=gateway.host,
            port=gateway.port,
            host_key=" ".join((directory / "host.pub").read_text().split()[:2]),
            user=USER,
            slot=slot,
            network=gateway.network,
            key=key.read_text(),
            certificate=Path(f"{key}-cert.pub").read_text(),
            expires=now + 60 * minutes,
        )


def revoke(directory: Path, machine: str) -> None:
    """Admit a machine no longer, and end its connection.

    Args:
        directory: Directory with the files that `prepare` wrote.
        machine: Address of the machine in its tunnel, under which Ray lists it.

    Raises:
        ConfigError: This process is not root, no gateway was prepared, or no machine has this address.
    """
    gateway = _prepared(directory)
    slots = {address(gateway.network, slot): slot for slot in range(1, gateway.machines + 1)}
    if machine not in slots:
        raise ConfigError(
            "--revoke", machine, f"is no address of a machine that joins; they begin with {next(iter(slots))}"
        )
    name = str(slots[machine])
    with _locked(directory):
        (directory / "machines" / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            # as if the token was used: it may still be valid
            (directory / "used" / str(json.loads((directory / "slots" / name).read_text())["serial"])).touch()
    with contextlib.suppress(OSError, ValueError):
        serving = int((directory / "machines" / f"connection-{name}").read_text())
        if Path(f"/proc/{serving}").stat().st_uid == pwd.getpwnam(USER).pw_uid:  # that user wrote the number
            os.kill(serving, signal.SIGTERM)


def _prepared(directory: Path) -> Gateway:
    _require_root("join-token")
    try:
        return Gateway.model_validate_json((directory / "gateway.json").read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            "--state-dir", str(directory), "holds no gateway; start `moedisco join-gateway` on this machine first"
        ) from error


def _last_seen(directory: Path, slot: int) -> float:
    """When the machine that may come back to a tunnel was connected last (Unix time); 0 if none may."""
    try:
        return (directory / "machines" / str(slot)).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_free(directory: Path, slot: int, now: float) -> bool:
    """Whether a tunnel has neither a connected machine nor an unused token that is still valid.

    A machine that is away may have one: of such tunnels, the one whose machine is away longest is given to another.
    """
    try:
        token: Mapping[str, float] = json.loads((directory / "slots" / str(slot)).read_text())
    except FileNotFoundError:
        return not _is_connected(slot)
    unused = not (directory / "used" / str(token["serial"])).exists()
    return not _is_connected(slot) and not (unused and token["expires"] > now)


def _is_connected(slot: int) -> bool:
    try:
        return Path(f"/sys/class/net/{device_name(slot)}/carrier").read_text().strip() == "1"
    except OSError:
        return False


def _make_devices(gateway: Gateway) -> None:
    """Create the tunnel devices, each with a route to its machine. The unprivileged user of the sshd may open them."""
    head = address(gateway.network, 0)
    if not Path("/dev/net/tun").exists():
        raise ConfigError("/dev/net/tun", None, "does not exist; load the kernel module `tun`")
    Path("/dev/net/tun").chmod(0o666)  # the mode that udev sets, too; a tunnel device still opens only for its owner
    for slot in range(1, gateway.machines + 1):
        name = device_name(slot)
        if not Path(f"/sys/class/net/{name}").exists():
            _run(["ip", "tuntap", "add", "dev", name, "mode", "tun", "user", USER])
        _run(["ip", "address", "replace", head, "peer", address(gateway.network, slot), "dev", name])
        _run(["ip", "link", "set", name, "mtu", "1400", "up"])
        settings = Path("/proc/sys/net/ipv4/conf") / name
        (settings / "rp_filter").write_text("1")  # accept only packets from the machine's own address
        (settings / "forwarding").write_text("0")  # accept only packets for the head itself


def _make_user() -> None:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        # sshd refuses locked accounts. The password field `*` does not lock the account, and no password matches it.
        _run(
            [
                "useradd",
                "--system",
                "--user-group",
                "--no-create-home",
                "--home-dir",
                "/",
                "--shell",
                "/bin/sh",
                "--password",
                "*",
                USER,
            ]
        )


def _without_penalties(directory: Path) -> str:
    """A line with which sshd never shuts out an address, behind which there may be many machines; OpenSSH 9.8 does."""
    line = "PerSourcePenalties no"
    known = subprocess.run(  # noqa: S603 - OpenSSH's
        [SSHD, "-t", "-f", "/dev/null", "-h", str(directory / "host"), "-o", line], capture_output=True, check=False
    )
    return f"{line}\n" if known.returncode == 0 else ""


def _forget_old(used: Path) -> None:
    """Delete the files of used serial numbers after two weeks; certificates are valid for at most one week."""
    for path in used.iterdir():
        if path.stat().st_mtime < time.time() - 14 * 86_400:
            path.unlink()


def _utc(seconds: float) -> str:
    """Format a Unix time for ssh-keygen, whose time zone is set to UTC."""
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "slots" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str, mode: int) -> None:
    draft = path.with_suffix(".new")
    draft.touch(mode=0o600)
    draft.write_text(text, encoding="utf-8")
    draft.chmod(mode)
    draft.replace(path)


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise ConfigError(f"moedisco {command}", None, "needs root; run it with sudo")


def _require_tools(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise ConfigError("PATH", None, f"has no {', '.join(missing)}; install openssh-server, iproute2 and passwd")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(  # noqa: S603 - fixed programs, our own arguments
        command, capture_output=True, text=True, check=False, env=os.environ | {"TZ": "UTC0"}
    )
    if done.returncode:
        raise ConfigError(command[0], " ".join(command[1:]), f"failed: {done.stderr.strip()}")
