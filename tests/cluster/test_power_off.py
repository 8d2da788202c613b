"""The literal scripts of a worker whose head is cut off: a cloud's machine powers itself off, and no other does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster_files import FOLDER, load
from hosts import until

from moedisco_ray.execution.clouds import CLOUDS

BIN = Path(sys.executable).parent
MACHINE = "/subscriptions/s/resourceGroups/moedisco/providers/Microsoft.Compute/virtualMachines/ray-worker-1"
STUBS = {
    "ray": "",
    "moedisco": "",
    "pgrep": "echo 4194304",
    "sudo": 'exec "$@"',
    "shutdown": 'echo "shutdown $*" >>{log}',
    "curl": """
case "$*" in
    *metadata/instance/compute/resourceId*) printf %s {machine} ;;
    *metadata/identity/oauth2/token*) echo '{{"access_token": "SECRET"}}' ;;
    *) echo "curl $* with $(cat)" >>{log} ;;
esac""",
}
ENDS = {
    "aws": "shutdown -h now",
    "gcp": "shutdown -h now",
    "azure": f"curl -sf --request POST --data  --header @- https://management.azure.com{MACHINE}/deallocate"
    "?api-version=2024-07-01 with Authorization: Bearer SECRET",
}
"""What a machine of each cloud calls to end itself."""
LIMIT = 2
"""Seconds without a head, in place of 15 minutes."""


class Worker:
    """A machine on which `worker.sh` runs, with stand-ins for what would end the machine.

    Args:
        folder: Home of the machine.
        head: Address of the head, on the loopback.
    """

    def __init__(self, folder, head):
        self._folder, self._head = folder, head
        self.log = folder / "ended"
        self._node = folder / "moedisco" / "cluster_yaml" / "node"
        for part in ("node", *CLOUDS):
            shutil.copytree(FOLDER / part, folder / "moedisco" / "cluster_yaml" / part)
        (self._node / "keep.sh").write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{folder}/kept\n')
        (self._node / "cache_disk.sh").write_text("#!/bin/bash\necho /ssd/moedisco 112\n")
        stubs = folder / "bin"
        stubs.mkdir()
        for name, text in STUBS.items():
            (stubs / name).write_text(f"#!/bin/bash\n{text.format(log=self.log, machine=MACHINE)}\n")
            (stubs / name).chmod(0o755)
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("MOEDISCO_")} | {
            "HOME": str(folder),
            "PATH": f"{stubs}:{BIN}:{os.environ['PATH']}",
            "RAY_HEAD_IP": head,
        }

    def start(self, *arguments):
        """Run `worker.sh`; returns the commands that the machine then keeps running, by their names."""
        subprocess.run(["bash", self._node / "worker.sh", *arguments], env=self._environment, check=True)
        kept = self._folder / "kept"
        lines = kept.read_text().splitlines() if kept.exists() else []
        return {line.split()[0]: line.split()[1:] for line in lines}

    def spawn(self, command):
        return subprocess.Popen(command, env=self._environment, start_new_session=True, stderr=subprocess.DEVNULL)

    def ended(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def head():
    """A head that listens where Ray's does, until it is closed; on an address of its own."""
    with socket.create_server(("127.0.41.7", 6379)) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_clouds_machine_ends_itself_once_its_head_is_gone(head, tmp_path, cloud):
    """Before (a0c02aba): nothing did, and the machine was billed until someone noticed."""
    worker = Worker(tmp_path, head.getsockname()[0])
    command = worker.start(cloud).get("moedisco-power-off")
    assert command is not None, "nothing watches the head"
    watching = worker.spawn([*command, str(LIMIT), "0.2"])
    try:
        time.sleep(2 * LIMIT)
        assert not worker.ended(), "the head is there"
        head.close()
        began = time.monotonic()
        until(worker.ended, 10 * LIMIT, "the machine has not ended")
        assert time.monotonic() - began >= LIMIT - 1
        assert set(worker.ended()) == {ENDS[cloud]}
        assert watching.poll() is None, "it would try again"
    finally:
        watching.kill()
        watching.wait(10)


@pytest.mark.slow
def test_a_head_that_only_restarts_ends_no_machine(head, tmp_path):
    worker = Worker(tmp_path, head.getsockname()[0])
    watching = worker.spawn([*worker.start("aws")["moedisco-power-off"], str(2 * LIMIT), "0.2"])
    try:
        for _ in range(3):
            address = head.getsockname()
            head.close()
            time.sleep(LIMIT / 2)
            head = socket.create_server(address)
            time.sleep(LIMIT / 2)
        assert not worker.ended()
    finally:
        head.close()
        watching.kill()
        watching.wait(10)


def test_a_machine_of_your_own_is_never_powered_off(head, tmp_path):
    config = load("on-prem")
    config["metadata"]["moedisco"]["node_types"]["low"]["resources"] = {"CPU": 1, "low_mem_gpu": 1}
    config["metadata"]["moedisco"]["hosts"] = {"127.0.0.1": "low"}
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(config))
    worker = Worker(tmp_path, head.getsockname()[0])
    assert worker.start("hosts", str(tmp_path / "hosts.yaml")) == {}
    assert not worker.ended()
