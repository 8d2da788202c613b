"""`moedisco join` from a machine that can only open connections: it trains and leaves, and its token does no more."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from hosts import PYTHON, Hosts, copy_checkout, finished, listens, run, send, until
from ray_on_hosts import TOKEN, RayOnHosts
from s3_standin import KEYS, s3_server
from small_run import small_config
from step_account import attempts, lost

from moedisco_ray.contrib.join.head import USER
from moedisco_ray.contrib.join.token import JoinToken
from moedisco_ray.core.records.events import EventLog
from moedisco_ray.core.store.run_store import RunStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
PORT = 7722
INTERVAL = 10
"""Steps between two checkpoints."""
LOST = "the connection to {} ended; joining again"
GONE = "moedisco: {} has been away for 0.5 minutes; to join again, ask for a new token"


class Places:
    """A head, and a machine in another network whose router passes it only the answers of the head's port for joining.

    Args:
        base: Directory that both see.
    """

    def __init__(self, base):
        self.base = base
        self.cloud = Hosts(base / "cloud", ("head",), "10.78.21", checkout=base / "checkout")
        self.home = Hosts(base / "home", ("machine",), "10.78.22", checkout=base / "checkout")
        # sshd wants directories that only root may write
        self.state = Path(tempfile.mkdtemp(prefix="mdj", dir="/var/lib"))
        self.state.chmod(0o755)
        self._undo = contextlib.ExitStack()
        tun = Path("/dev/net/tun")
        self._undo.callback(tun.chmod, tun.stat().st_mode)  # the gateway lets every user open it, as udev does

    def start(self):
        copy_checkout(self.cloud.checkout)
        for hosts in (self.cloud, self.home):
            hosts.base.mkdir()
            hosts.start()
            Path(f"/proc/sys/net/ipv4/conf/{hosts.bridge}/forwarding").write_text("1")
        with (self.cloud.base / "head" / "passwd").open("a") as passwd:
            passwd.write(f"{USER}:*:64321:64321::/:/bin/sh\n")
        rule = ("iif", self.cloud.bridge, "to", f"{self.home.address['machine']}/32")
        for preference, what in (
            ("5001", ("ipproto", "tcp", "sport", str(PORT), "lookup", "main")),
            ("5002", ("blackhole",)),
        ):
            run("ip", "rule", "add", "pref", preference, *rule, *what)
            self._undo.callback(run, "ip", "rule", "del", "pref", preference, *rule, *what)

    def stop(self):
        self._undo.close()
        for hosts in (self.home, self.cloud):
            hosts.stop()
        shutil.rmtree(self.state)

    @property
    def head(self):
        return self.cloud.address["head"]

    def spawn(self, name, *command, **environment):
        """Start a command on a host; its output goes to a file."""
        return (self.cloud if name == "head" else self.home).spawn(name, *command, **environment)

    def moedisco(self, name, *arguments, **environment):
        return self.spawn(name, PYTHON, "-m", "service", *arguments, **environment)

    @contextlib.contextmanager
    def gateway(self, ray_address):
        process = self.moedisco(
            "head",
            "join-gateway",
            f"--public-host={self.head}",
            f"--port={PORT}",
            f"--ray-address={ray_address}",
            "--machines=32",
            f"--state-dir={self.state}",
            RAY_AUTH_TOKEN=TOKEN["RAY_AUTH_TOKEN"],
        )
        try:
            until(lambda: listens(self.head, PORT), 120, process.log.read_text)
            yield
        finally:
            send(signal.SIGTERM, process)
            process.wait(30)

    def tokens(self, count):
        code, output = finished(self.moedisco("head", "join-token", f"--count={count}", f"--state-dir={self.state}"))
        assert code == 0, output
        return output.split()

    def token(self):
        [token] = self.tokens(1)
        return token

    def expired_token(self):
        """A token that was issued two hours ago for one hour."""
        code, output = finished(
            self.spawn(
                "head",
                PYTHON,
                "-c",
                "import sys, time; from pathlib import Path; from moedisco_ray.contrib.join.head import issue; "
                "print(issue(Path(sys.argv[1]), 60, time.time() - 7200).encoded())",
                self.state,
            )
        )
        assert code == 0, output
        return output.strip()

    def join(self, token, *options, **environment):
        return self.moedisco("machine", "join", token, "--gpus=0", "--slots=1", *options, **environment)

    def ssh(self, token, *arguments, says="", seconds=30):
        """What ssh with a token's certificate, or with a key alone, prints after it has sent some lines."""
        process = self.spawn_ssh(token, *arguments, says=says)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        send(signal.SIGTERM, process)
        process.wait(10)
        return process.log.read_text()

    def spawn_ssh(self, token, *arguments, says="", stays=0):
        """Start ssh, which sends some lines at once and keeps its input open for some seconds."""
        folder = Path(tempfile.mkdtemp(dir=self.base))
        files = {"key": token.key, "key-cert.pub": token.certificate, "known": f"head {token.host_key}\n"}
        for name, text in files.items():
            if text:
                (folder / name).write_text(text)
                (folder / name).chmod(0o600)
        return self.spawn(
            "machine",
            "bash",
            "-c",
            'says=$1 stays=$2; shift 2; (printf "%s" "$says"; sleep "$stays") | "$@"',
            "bash",
            says,
            stays,
            "ssh",
            "-F",
            "none",
            "-i",
            folder / "key",
            "-o",
            f"UserKnownHostsFile={folder / 'known'}",
            "-o",
            "HostKeyAlias=head",
            "-o",
            "BatchMode=yes",
            "-o",
            "ExitOnForwardFailure=yes",
            "-p",
            token.port,
            *arguments[:-1],
            f"{token.user}@{token.host}",
            *arguments[-1],
        )


@pytest.fixture(scope="module")
def places():
    base = Path(tempfile.mkdtemp(prefix="md", dir="/var/tmp"))
    places = Places(base)
    try:
        places.start()
        yield places
    finally:
        places.stop()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="module")
def gateway(places):
    with places.gateway(f"{places.head}:6379"):
        yield


def test_the_head_cannot_open_a_connection_to_the_machine(places):
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"
    address = places.home.address["machine"]
    assert listens(address, 22)
    code, output = finished(places.spawn("head", PYTHON, "-c", reach, address, 22))
    assert (code, "timed out" in output) == (1, True), output


def test_a_token_opens_neither_a_shell_nor_a_port_nor_files(places, gateway):
    tokens = [JoinToken.decode(token) for token in places.tokens(12)]
    fresh = tokens.pop
    assert '"ray_address"' in places.ssh(fresh(), "-T", ["id; cat /etc/passwd"], seconds=5)
    for command in (["id"], []):
        output = places.ssh(fresh(), "-tt", command, seconds=5)
        assert "uid=" not in output
        assert "PTY allocation request failed" in output
    assert "uid=" not in places.ssh(fresh(), "-T", ["id"], seconds=5)
    assert "remote port forwarding failed" in places.ssh(fresh(), "-N", "-R", "9022:127.0.0.1:22", [])
    assert "forwarding" in places.ssh(fresh(), "-N", "-R", f"{places.base}/socket:127.0.0.1:22", [])
    assert "administratively prohibited" in places.ssh(fresh(), "-W", f"{places.head}:22", [])
    assert "uid" not in places.ssh(fresh(), "-s", ["sftp"], seconds=5)
    token = fresh()
    for user in ("root", "nobody"):
        assert "Permission denied" in places.ssh(token.model_copy(update={"user": user}), "-T", ["id"])


def machines_key(places):
    """A key that a machine has made, and the line that it sends to the head about it."""
    key = Path(tempfile.mkdtemp(dir=places.base)) / "own"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    return key.read_text(), f"key {Path(f'{key}.pub').read_text().split()[1]}\n"


def test_a_machine_comes_back_with_its_own_key_until_it_is_revoked(places, gateway):
    """Before (a0c02aba): the head refused the key: "Permission denied (publickey)"."""
    token = JoinToken.decode(places.token())
    key, says = machines_key(places)
    again = token.model_copy(update={"key": key, "certificate": ""})
    assert "Permission denied" in places.ssh(again, "-T", [])
    assert '"ray_address"' in places.ssh(token, "-T", [], says=says)
    assert "Permission denied" in places.ssh(token, "-T", [], says=says), "a token works once"
    for _ in range(2):
        assert '"ray_address"' in places.ssh(again, "-T", ["id; cat /etc/passwd"])
    assert "PTY allocation request failed" in places.ssh(again, "-tt", [])
    assert "administratively prohibited" in places.ssh(again, "-W", f"{places.head}:22", [])
    foreign = f"{token.device}:{token.device + 1}"
    assert "Tunnel forwarding failed" in places.ssh(again, "-T", "-w", foreign, [], says="")

    connected = places.spawn_ssh(again, "-T", [], stays=60)
    until(lambda: "ray_address" in connected.log.read_text(), 20, connected.log.read_text)
    code, shown = finished(
        places.moedisco("head", "join-token", f"--revoke={token.own_address}", f"--state-dir={places.state}")
    )
    assert (code, shown) == (0, f"{token.own_address} is admitted no longer\n")
    assert "Permission denied" in places.ssh(again, "-T", [])
    until(lambda: not serving(places, token.slot), 10, "the open connection has ended")
    send(signal.SIGTERM, connected)
    connected.wait(70)


def serving(places, slot):
    """Whether the process that served a machine's connection is alive on the head."""
    process = (places.state / "machines" / f"connection-{slot}").read_text().strip()
    return f" {process} " in places.cloud.execute("head", "ps", "-eo", "pid,args", "--no-headers")


def test_a_machine_that_left_or_was_away_for_days_needs_a_new_token(places, gateway):
    for what in ("leaves", "is away"):
        token = JoinToken.decode(places.token())
        key, says = machines_key(places)
        again = token.model_copy(update={"key": key, "certificate": ""})
        places.ssh(token, "-T", [], says=says)
        if what == "leaves":
            assert '"ray_address"' in places.ssh(again, "-T", [], says="leave\n")
        else:
            eight_days_ago = time.time() - 8 * 86_400
            os.utime(places.state / "machines" / str(token.slot), (eight_days_ago, eight_days_ago))
        assert "Permission denied" in places.ssh(again, "-T", []), what


def test_refusals_are_one_line_each(places, gateway):
    used = places.token()
    assert '"ray_address"' in places.ssh(JoinToken.decode(used), "-T", [], seconds=5)
    expired = places.expired_token()
    as_if_valid = JoinToken.decode(expired, now=0).model_copy(update={"expires": time.time() + 600}).encoded()
    unreachable = JoinToken.decode(places.token()).model_copy(update={"port": 7723}).encoded()
    foreign = JoinToken.decode(places.token())
    key = places.base / "foreign"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    foreign = foreign.model_copy(
        update={"key": key.read_text(), "certificate": key.with_suffix(".pub").read_text()}
    ).encoded()
    attempts = {
        "nonsense": ("not-a-token", "is not a join token"),
        "truncated": (used[:-40], "is not a join token"),
        "used": (used, "it was used before, or another head issued it"),
        "foreign": (foreign, "another head issued it"),
        "expired": (expired, "expired at"),
        "expired for sshd": (as_if_valid, "the head refuses it"),
        "unreachable": (unreachable, "the head does not answer there"),
    }
    for name, (token, says) in attempts.items():
        code, output = finished(places.join(token))
        assert (code, says in output, len(output.splitlines())) == (2, True, 1), f"{name}: {output}"
        assert output.startswith("moedisco: TOKEN: ")


@pytest.fixture(scope="module")
def ray(places, gateway):
    ray = RayOnHosts(places.cloud, KEYS)
    ray.start("head", cpus=2, resources={"high_mem_gpu": 1})
    return ray


@pytest.fixture(scope="module")
def output(places):
    """URI of an S3 server that both reach, so that a machine that is cut off can write nothing more."""
    with s3_server("runs", places.cloud.gateway) as server:
        yield f"s3://runs/team?endpoint_override={server}&scheme=http"


@pytest.fixture(scope="module")
def text(places):
    text = places.base / "text"
    text.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        shutil.copy(path, text)
    return text


def configuration(text, output, name):
    """A run whose sub-models take 20 s each on a fast machine, so that the joined machine is lost before they end."""
    return small_config(
        output,
        name=name,
        corpus={"sources": [{"path": f"{text}/*.py", "documents": "paragraph", "format": "text"}]},
        tokens={"total": 2_400_000, "finetune_share": 0.05},
        checkpoint={"every": INTERVAL},
    )


def started(places, config):
    """A run on the head whose events are its output."""
    file = places.base / f"{config.name}.json"
    file.write_text(config.model_dump_json(exclude_defaults=True))
    return places.moedisco("head", "run", file, "--json", RAY_ADDRESS="auto", **TOKEN, **KEYS)


@contextlib.contextmanager
def joined(places, ray, token, *options):
    """A machine whose slot Ray offers; it leaves at the end, if it is still there."""
    machine = places.join(token, *options, **KEYS)
    address = JoinToken.decode(token).own_address
    try:
        until(
            lambda: "offers 1 low_mem_gpu" in machine.log.read_text() or machine.poll() is not None,
            120,
            machine.log.read_text,
        )
        until(lambda: ray.nodes().get(address, {}).get("low_mem_gpu") == 1, 240, machine.log.read_text)
        yield machine
    finally:
        send(signal.SIGTERM, machine)
        machine.wait(120)


def test_a_machine_behind_a_nat_joins_trains_and_leaves(places, ray, text, output):
    token = places.token()
    address = JoinToken.decode(token).own_address
    with joined(places, ray, token, "--grace=20") as machine:
        config = configuration(text, output, "joins")
        run = started(places, config)
        code, shown = finished(run, 900)
        assert code == 0, shown
        where = {
            event.unit: event.data["node"]
            for event in EventLog.parse(run.log.read_bytes())
            if event.type == "unit_started"
        }
        assert {node for unit, node in where.items() if unit.startswith("submodel")} == {address}, where
        assert RunStore.of(config.location).has(config.directory / "model" / "model.safetensors")
    code, shown = finished(machine)
    assert (code, shown.splitlines()[-1]) == (0, "left"), shown
    assert list(ray.nodes()) == [places.head]
    assert places.home.execute("machine", "ip", "rule").count("lookup") == 3, "the machine's own rules are as before"
    code, shown = finished(places.join(token))
    assert (code, "was used before" in shown) == (2, True), shown


@pytest.mark.parametrize("way", ["killed", "cut off"])
def test_a_machine_that_is_lost_in_training_costs_an_interval_at_most(places, ray, text, output, way):
    """A machine that was cut off joins again by itself, with the key that it has made.

    Before (a0c02aba): it ended with "the connection to ... ended; to join again, ask for a new token".
    """
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(joined(places, ray, places.token(), "--grace=20"))
        run = started(places, configuration(text, output, way.replace(" ", "-")))
        step = random.Random(way).randrange(INTERVAL, 2 * INTERVAL)
        until(lambda: trained_steps(run) >= step, 600, run.log.read_text)
        if way == "killed":
            send(signal.SIGKILL, machine)
            machine.wait(30)
            machine = stack.enter_context(joined(places, ray, places.token(), "--grace=20"))
        else:
            places.home.unplug("machine")
            until(lambda: LOST.format(places.head) in machine.log.read_text(), 120, machine.log.read_text)
            places.home.plug_in("machine")
            until(lambda: machine.log.read_text().count("offers 1 low_mem_gpu") == 2, 180, machine.log.read_text)
        code, shown = finished(run, 900)
        assert code == 0, shown
        events = list(EventLog.parse(run.log.read_bytes()))
        (restart,) = [event for event in events if event.type == "worker_restarted"]
        steps_lost = {unit: sum(lost(each)) for unit, each in attempts(events).items()}
        assert restart.data["kind"] in ("preempted", "died")
        assert steps_lost[restart.unit] <= INTERVAL
        assert not any(steps for unit, steps in steps_lost.items() if unit != restart.unit)
    assert finished(machine)[0] == 0
    until(lambda: list(ray.nodes()) == [places.head], 120, "only the head is left")


def trained_steps(run):
    """Steps of the sub-model that has trained most."""
    assert run.poll() is None, run.log.read_text()
    events = list(EventLog.parse(run.log.read_bytes()))
    return max(
        (event.data["step"] for event in events if event.type == "progress" and event.stage == "submodels"), default=0
    )


def test_a_machine_whose_head_is_lost_ends_with_one_line(places, ray):
    with joined(places, ray, places.token(), "--patience=0.5") as machine:
        places.cloud.power_off("head")
        code, shown = finished(machine, 240)
    assert (code, shown.splitlines()[-1]) == (1, GONE.format(places.head)), shown
    assert LOST.format(places.head) in shown
    assert "Traceback" not in shown
    assert places.home.execute("machine", "ip", "rule").count("lookup") == 3
    until(lambda: not places.home.processes("machine"), 30, lambda: places.home.processes("machine"))
