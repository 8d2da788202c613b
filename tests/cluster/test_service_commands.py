"""The service's command in every cluster file and in the image starts as written, and answers its probe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_files import FOLDER, ROOT, kubernetes_objects, load

from service.settings import Settings

PORT = Settings.model_fields["port"].default
LOOPBACK = "127.0.0.1"
OF_THE_MACHINE = "127.0.0.2"
"""Stands for the address of a pod or container: reached by a program that listens on all addresses, not by one on
127.0.0.1."""
SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])


@pytest.fixture
def port() -> int:
    return free_port()


def stand_in(port: int) -> list[str]:
    """Options behind the literal ones: a free port, and a Ray that is still starting, as on a head that starts."""
    return [f"--port={port}", f"--ray-address=http://{LOOPBACK}:{free_port()}"]


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOEDISCO_", "XDG_"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | more


def healthy(address: str, port: int) -> None:
    """Ask as a probe does, until there is an answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + SECONDS
    status = 0
    while status != 200:
        assert time.monotonic() < deadline, f"no answer at {address}:{port}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            status = opener.open(f"http://{address}:{port}/healthz", timeout=5).status
        time.sleep(0.05)


@contextlib.contextmanager
def started(words: list[str], surroundings: dict[str, str], log: Path) -> Iterator[None]:
    """Run `moedisco ...`; a command that ends is a failure with its output."""
    assert words[0] == "moedisco"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", *words[1:]],
            env=surroundings,
            cwd=surroundings["HOME"],
            stdout=output,
            stderr=output,
        )
    try:
        while process.poll() is None and "MoE-DisCo is at" not in log.read_text():
            time.sleep(0.05)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.mark.slow
def test_the_command_of_the_kubernetes_file_answers_its_probes(tmp_path: Path, port: int) -> None:
    (cluster,) = [each for each in kubernetes_objects() if each["kind"] == "RayCluster"]
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    (service,) = [each for each in pod["initContainers"] if each["name"] == "service"]
    mounts = {mount["name"]: Path(f"{tmp_path}{mount['mountPath']}") for mount in service["volumeMounts"]}
    for mount in mounts.values():
        mount.mkdir(parents=True)
    token = "0123456789abcdef" * 4  # as `openssl rand -hex 32` makes it, in the Secret that the file's header creates
    for volume in pod["volumes"]:
        if "secret" in volume and volume["name"] in mounts:
            assert (
                f"kubectl create secret generic {volume['secret']['secretName']} --from-literal=token="
                in (FOLDER / "kuberay.yaml").read_text()
            )
            (mounts[volume["name"]] / "token").write_text(token)

    def here(text: str) -> str:
        return re.sub(r"(?<!MY_BUCKET)/moedisco/", f"{tmp_path}/moedisco/", text)

    given = {entry["name"]: here(entry["value"]) for entry in service["env"] if "value" in entry}
    words = [here(word) for word in (*service["command"], *service["args"])]
    for probe in ("livenessProbe", "readinessProbe"):
        assert service[probe]["httpGet"]["port"] == PORT
    with started([*words, *stand_in(port)], environment(tmp_path, **given), tmp_path / "log"):
        healthy(OF_THE_MACHINE, port)
        asked = urllib.request.Request(
            f"http://{OF_THE_MACHINE}:{port}/v1/tokens", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=5) as answer:
            assert answer.status == 200
    assert token not in (tmp_path / "log").read_text()  # `kubectl logs` shows it


@pytest.mark.slow
def test_the_command_of_the_image_answers_at_its_published_port(tmp_path: Path, port: int) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert re.search(rf"^EXPOSE {PORT}$", text, re.MULTILINE)
    assert f"http://{LOOPBACK}:{PORT}/healthz" in text
    words = json.loads(re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)[-1])
    with started([*words, *stand_in(port)], environment(tmp_path), tmp_path / "log"):
        for address in (LOOPBACK, OF_THE_MACHINE):
            healthy(address, port)


@pytest.mark.slow
def test_the_command_beside_the_fake_cluster_answers(tmp_path: Path, port: int) -> None:
    (command,) = re.findall(r"^#   (moedisco serve .*)$", (FOLDER / "local-fake.yaml").read_text(), re.MULTILINE)
    with started([*shlex.split(command), *stand_in(port)], environment(tmp_path), tmp_path / "log"):
        healthy(LOOPBACK, port)


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="would make units of this machine's systemd")
@pytest.mark.parametrize(
    "name",
    ["on-prem", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aws/spot", "gcp/spot", "azure/spot"))],
)
def test_the_command_that_starts_a_head_brings_the_service_up(tmp_path: Path, port: int, name: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "moedisco" / "cluster_yaml")
    subprocess.run(["bash", "-c", load(name)["setup_commands"][0]], env=environment(tmp_path), check=True)
    programs = tmp_path / "moedisco" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "ray").write_text("#!/bin/sh\nexit 0\n")
    (programs / "moedisco").write_text(
        f'#!/bin/sh\necho $$ >"$HOME/pid"\nexec {sys.executable} -m service "$@" {shlex.join(stand_in(port))}\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    command = load(name)["head_start_ray_commands"][-1]
    assert "head.sh" in command
    # What keeps the service running ends with the port of Ray's control store.
    head = f"127.{os.getpid() % 200 + 1}.{port // 256}.{port % 256}"
    with socket.create_server((head, 6379)):
        subprocess.run(["bash", "-c", command], env=environment(tmp_path, RAY_HEAD_IP=head), check=True, timeout=60)
        try:
            healthy(LOOPBACK, port)
        finally:
            service = psutil.Process(int((tmp_path / "pid").read_text()))
            keeper = service.parent()
            for process in (keeper, service):
                process.terminate()
            psutil.wait_procs([keeper, service], timeout=60)
    log = (tmp_path / "moedisco.log").read_text()
    token = (tmp_path / "moedisco-state" / "state" / "admin-token").read_text().strip()
    assert "admin-token" in log
    assert token not in log
