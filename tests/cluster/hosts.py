"""Several hosts on one machine: network, process and mount namespaces.

Each host has its own address, home, /tmp, /dev/shm and sshd.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "cluster_yaml" / "node" / "requirements.txt"
ENVIRONMENT = Path(sys.executable).parents[1]
SITE_PACKAGES = ENVIRONMENT / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
HIDDEN = tuple(path for path in (LOCK.parents[2], ENVIRONMENT) if path.is_relative_to("/tmp"))
"""The clone and the environment of the tests, where a host's own /tmp would hide them."""
HOME = "/home/host"
PYTHON = f"{HOME}/moedisco/.venv/bin/python"
SSHD = Path("/usr/sbin/sshd")
TOOLS = ("sshd", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")


def require_tools():
    """Say what is missing, where hosts cannot be made."""
    assert os.geteuid() == 0, "hosts are namespaces of this machine, which only root can make"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    assert not missing, f"no {', '.join(missing)} here: apt-get install openssh-server iproute2 rsync"


class Hosts:
    """A bridge with hosts on it.

    Args:
        base: A directory of short path outside /tmp, which every host sees.
        names: Of the hosts.
        subnet: First three numbers of their addresses.
        private: Whether hosts can write to nothing but their own home, /tmp and /dev/shm, so that they share no
            directory.
        debian: Whether each host's own name leads to 127.0.1.1, as Debian's and Ubuntu's installers write it.
        checkout: Where the hosts see a copy of the project (`copy_checkout`); omitted: `checkout` in `base`.
    """

    def __init__(self, base, names, subnet, *, private=False, debian=False, checkout=None):
        self.base = base
        self._private = private
        self._debian = debian
        self.address = {name: f"{subnet}.{10 + i}" for i, name in enumerate(names)}
        self.key = base / "key"
        self.checkout = checkout or base / "checkout"
        # The kernel takes its time to forget an interface: each bridge has a name of its own.
        self.bridge = f"md{secrets.token_hex(4)}"
        self.gateway = f"{subnet}.1"
        self._inits = {}

    def start(self):
        require_tools()
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.base / "hostkey")
        self._remove_leftovers()
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        for name in self.address:
            self._connect(name)
            self._furnish(name)
            self._boot(name)

    def _remove_leftovers(self):
        """Remove the bridges that a killed test has left with our address: packets for our hosts would go there."""
        listed = json.loads(subprocess.check_output(["ip", "-json", "address", "show", "type", "bridge"]))
        for link in listed:
            if self.gateway in [each.get("local") for each in link.get("addr_info", ())]:
                run("ip", "link", "del", link["ifname"])

    def stop(self):
        for name in self.address:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.power_off(name)
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "del", self._namespace(name))
        with contextlib.suppress(subprocess.CalledProcessError):
            run("ip", "link", "del", self.bridge)

    def home(self, name):
        return self.base / name / "home"

    def power_off(self, name):
        """End every process of a host at once, without notice."""
        init = self._inits.pop(name, None)
        if init is not None:
            init.send_signal(signal.SIGKILL)
            init.wait(30)

    def unplug(self, name):
        """Cut a host off: its processes keep running, and no one can reach them."""
        run("ip", "netns", "exec", self._namespace(name), "ip", "link", "set", "eth0", "down")

    def plug_in(self, name):
        """Connect a host again that was cut off."""
        inside = ("ip", "netns", "exec", self._namespace(name))
        run(*inside, "ip", "link", "set", "eth0", "up")
        run(*inside, "ip", "route", "replace", "default", "via", self.gateway)

    def power_on(self, name):
        """Boot a host that was powered off: its home and /tmp are as they were, its processes gone."""
        self._boot(name)

    @contextlib.contextmanager
    def tunnel(self, name, port):
        """Yield a port of this machine that leads through ssh to a loopback port of a host."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ours = probe.getsockname()[1]
        ssh = subprocess.Popen(
            [
                "ssh",
                "-N",
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-i",
                self.key,
                "-L",
                f"{ours}:127.0.0.1:{port}",
                f"root@{self.address[name]}",
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            until(lambda: listens("127.0.0.1", ours), 30, "the tunnel")
            yield ours
        finally:
            ssh.terminate()
            ssh.wait(10)

    def processes(self, name):
        """Command lines of what runs on a host besides sshd."""
        listed = self.execute(name, "ps", "-ww", "-eo", "args", "--no-headers").splitlines()
        return [line for line in listed if not line.startswith(("/usr/sbin/sshd", "sshd", "ps -ww", "unshare"))]

    def execute(self, name, *command):
        """What a command that runs on a host prints."""
        entered = [*self.enter(name), *map(str, command)]
        return subprocess.run(entered, capture_output=True, text=True, check=True, timeout=60).stdout

    def spawn(self, name, *command, **environment):
        """Start a command on a host, with its output in a file: `log` of the process that is returned."""
        variables = {
            "PYTHONPATH": self.checkout,
            "HOME": HOME,
            "PATH": f"{HOME}/moedisco/.venv/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        } | environment
        path = self.base / f"{name}-{time.monotonic_ns()}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                [*self.enter(name), "env", *(f"{key}={value}" for key, value in variables.items()), *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        process.log = path
        return process

    def enter(self, name):
        """The words before a command with which it runs on a host."""
        return ["nsenter", f"--target={self._init_pid(name)}", "--all"]

    def _namespace(self, name):
        return f"{self.bridge}-{name}"

    def _init_pid(self, name):
        outer = self._inits[name].pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def _connect(self, name):
        space, cable = self._namespace(name), f"{self.bridge}{list(self.address).index(name)}"
        inside = ("ip", "netns", "exec", space)
        run("ip", "netns", "add", space)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", cable, "master", self.bridge, "up")
        run(*inside, "ip", "addr", "add", f"{self.address[name]}/24", "dev", "eth0")
        run(*inside, "ip", "link", "set", "eth0", "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*inside, "ip", "route", "add", "default", "via", self.gateway)

    def _furnish(self, name):
        folder = self.base / name
        for part in ("home/.ssh", "tmp", "run"):
            (folder / part).mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        for part in (folder / "home", folder / "home" / ".ssh"):
            part.chmod(0o700)
        shutil.copy(f"{self.key}.pub", folder / "home" / ".ssh" / "authorized_keys")
        (folder / "passwd").write_text(
            "".join(
                f"root:x:0:0:root:{HOME}:/bin/bash\n" if line.startswith("root:") else line
                for line in Path("/etc/passwd").read_text().splitlines(keepends=True)
            )
        )
        own_address = "127.0.1.1" if self._debian else self.address[name]
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{own_address} {name}\n")
        (folder / "sshd_config").write_text(
            f"ListenAddress {self.address[name]}\nHostKey {self.base}/hostkey\n"
            "PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            "MaxStartups 100\nMaxSessions 100\n"
        )
        install_dependencies(folder / "home" / "moedisco" / ".venv")

    def _boot(self, name):
        folder = self.base / name
        script = " && ".join(
            (
                *(f"mkdir -p {folder}/seen{path} && mount --bind {path} {folder}/seen{path}" for path in HIDDEN),
                f"mkdir -p {HOME} /run/sshd",
                f"mount --bind {folder}/home {HOME}",
                f"mount --bind {folder}/tmp /tmp",
                *(
                    f"mkdir -p {path} && mount --bind {folder}/seen{path} {path} && mount -o remount,bind,ro {path}"
                    for path in HIDDEN
                ),
                f"mount --bind {folder}/passwd /etc/passwd",
                f"mount --bind {folder}/hosts /etc/hosts",
                "mount -t tmpfs -o size=2g tmpfs /dev/shm",
                *(["mount -o remount,bind,ro /"] if self._private else []),
                f"hostname {name}",
                f"exec {SSHD} -D -e -f {folder}/sshd_config",
            )
        )
        with (folder / "sshd.log").open("w") as log:
            self._inits[name] = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    self._namespace(name),
                    "unshare",
                    "--mount",
                    "--uts",
                    "--pid",
                    "--fork",
                    "--mount-proc",
                    "--kill-child",
                    "bash",
                    "-c",
                    script,
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        until(lambda: listens(self.address[name], 22), 30, f"sshd of {name}: {folder}/sshd.log")


def install_dependencies(venv):
    """An environment as an administrator leaves it: everything that the project needs, and nothing of the project.

    The packages installed for the tests are used, because these hosts cannot reach a package index.
    """
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (venv / "lib" / SITE_PACKAGES.parent.name / "site-packages" / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n")
    for name, module in (("ray", "ray.scripts.scripts"), ("pip", "pip._internal.cli.main")):
        script = venv / "bin" / name
        script.write_text(f"#!{PYTHON}\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    packages_stamp(venv).touch()


def copy_checkout(directory):
    """Copy the project's packages to where hosts see them: their own /tmp may hide the checkout of the tests."""
    for part in ("moedisco_ray", "service"):
        shutil.copytree(LOCK.parents[2] / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))


def finished(process, seconds=120):
    """Exit code and output of a command that `spawn` started."""
    return process.wait(seconds), process.log.read_text()


def send(number, process):
    """Send a signal to a command that `spawn` started in another process namespace."""
    if process.poll() is not None:
        return
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), number)


def packages_stamp(venv):
    """The file by which install.sh recognises that an environment has the locked packages."""
    return venv / f".packages-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]}"


def run(*command):
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def listens(host, port):
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def until(happened, seconds, what):
    """Poll until something is so.

    Raises:
        AssertionError: It never was.
    """
    deadline = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.2)
    return result
