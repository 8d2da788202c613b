"""`ray up` for real with on-prem.yaml: three hosts made of namespaces; one is cut off during a run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from cluster_files import ROOT, load
from hosts import Hosts, until
from service_over_ssh import client_answers, slots
from small_run import small_config

from service.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
RAY = Path(sys.executable).with_name("ray")
TOKEN = "0123456789abcdef" * 4


class Laptop:
    """Where `ray up` is typed: a checkout whose on-prem.yaml names the hosts.

    Args:
        base: Holds the checkout, a home, and the directory that all hosts see.
        hosts: The first is the head.
    """

    def __init__(self, base, hosts):
        self.hosts = hosts
        self.checkout, self.shared = base / "checkout", base / "shared"
        self._home = base / "laptop"
        (self._home / ".ray").mkdir(parents=True)
        (self._home / ".ray" / "auth_token").write_text(TOKEN)
        self.shared.mkdir()
        for part in ("moedisco_ray", "service", "cluster_yaml"):
            shutil.copytree(ROOT / part, self.checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, self.checkout / part)
        self.file = self.checkout / "cluster_yaml" / "on-prem.yaml"
        self.file.write_text(yaml.safe_dump(self._edited(load("on-prem"))))

    def _edited(self, config):
        """The three parts that are the user's; and tags for machines without GPUs."""
        head, *workers = self.hosts.address.values()
        config["cluster_name"] = f"moedisco-{os.getpid()}"
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.key)}
        ours = config["metadata"]["moedisco"]
        ours["node_types"]["low"] |= {"resources": {"CPU": 1, "low_mem_gpu": 1}}
        ours["node_types"]["high"] |= {"resources": {"CPU": 1, "low_mem_gpu": 1, "high_mem_gpu": 1}}
        ours["hosts"] = dict(zip(workers, ("low", "high"), strict=True))
        config["setup_commands"] = [
            command.replace("s3://MY_BUCKET/moedisco", str(self.shared)) for command in config["setup_commands"]
        ]
        return config

    def ray(self, command, *arguments, seconds=600):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {
            "HOME": str(self._home),
            "PATH": path,
            "PYTHONPATH": str(self.checkout),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TERM": "dumb",
            "RAY_AUTH_MODE": "token",
        }
        done = subprocess.run(
            [RAY, command, self.file, *arguments],
            cwd=self.checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def tunnel(self):
        """The service of the head, through ssh."""
        with self.hosts.tunnel("head", 8300) as port, Client(f"http://127.0.0.1:{port}", self.token()) as client:
            until(lambda: client_answers(client), 90, self.service_log)
            yield client

    def token(self):
        """The first token, as the service left it for commands on the head."""
        saved = self.hosts.home("head") / "moedisco-state" / "config" / "moedisco" / "service.json"
        until(saved.exists, 120, self.service_log)
        return json.loads(saved.read_text())["token"]

    def service_log(self):
        log = self.hosts.home("head") / "moedisco.log"
        return log.read_text() if log.exists() else "the service never started"


@pytest.fixture
def laptop():
    # Hosts have a /tmp of their own, and Ray wants short paths.
    base = Path(tempfile.mkdtemp(prefix="md", dir="/var/tmp"))
    hosts = Hosts(base, ("head", "low", "high"), "10.78.5")
    try:
        hosts.start()
        yield Laptop(base, hosts)
    finally:
        hosts.stop()
        shutil.rmtree(base, ignore_errors=True)


def configuration(laptop):
    """A run on text in the folder of (3), here a directory of all hosts; a sub-model takes 20 s on a fast machine."""
    text = laptop.shared / "data" / "text"
    text.mkdir(parents=True)
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        shutil.copy(path, text)
    laptop.configured = small_config(
        Path("runs"),
        corpus={"sources": [{"path": f"{text}/*.py", "documents": "paragraph", "format": "text"}]},
        tokens={"total": 2_400_000, "finetune_share": 0.05},
    ).model_copy(update={"output": Path("runs")})
    return laptop.configured


def wait_for_work_on(client, run_id, address, step):
    """Follow a run until a sub-model that trains on a host has passed a step."""
    there = set()
    for _, event in client.events(run_id):
        if event.type == "unit_started" and event.data["node"] == address:
            there.add(event.unit)
        if event.type == "progress" and event.unit in there and event.data["step"] >= step:
            return
    raise AssertionError(f"no sub-model passed step {step} on {address}: {client.log(run_id)}")


def test_a_run_over_three_hosts_one_of_which_is_cut_off(laptop):
    laptop.ray("up", "--yes", "--no-config-cache")
    with laptop.tunnel() as client:
        until(
            lambda: slots(client) == {"low_mem_gpu": 2, "high_mem_gpu": 1},
            180,
            lambda: f"both workers: {client.pools()}",
        )
        run = client.submit(configuration(laptop))
        wait_for_work_on(client, run.id, laptop.hosts.address["low"], 12)
        laptop.hosts.unplug("low")
        finished = client.wait(run.id)
        assert finished.state == "succeeded", (finished.reason, client.log(run.id), laptop.service_log())
        assert slots(client)["low_mem_gpu"] == 1
        assert list((laptop.shared / "runs" / run.id).glob("*/model/model.safetensors"))
    laptop.ray("down", "--yes")
    for name in ("head", "high"):
        until(lambda name=name: not laptop.hosts.processes(name), 120, lambda name=name: laptop.hosts.processes(name))


def test_a_lost_head_comes_back_with_every_run_and_the_interrupted_one_goes_on(laptop):
    laptop.ray("up", "--yes", "--no-config-cache")
    with laptop.tunnel() as client:
        until(
            lambda: slots(client) == {"low_mem_gpu": 2, "high_mem_gpu": 1},
            180,
            lambda: f"both workers: {client.pools()}",
        )
        ended = client.submit(configuration(laptop))
        client.cancel(ended.id)
        client.wait(ended.id)
        run = client.submit(laptop.configured)
        wait_for_work_on(client, run.id, laptop.hosts.address["low"], 12)
    laptop.hosts.power_off("head")
    laptop.hosts.power_on("head")
    laptop.ray("up", "--yes", "--no-config-cache")
    with laptop.tunnel() as client:
        assert {each.id for each in client.runs()} == {ended.id, run.id}
        finished = client.wait(run.id)
        assert finished.state == "succeeded", (finished.reason, client.log(run.id), laptop.service_log())
        assert finished.attempt == 2
        restored = [event.data["restored_step"] for _, event in client.events(run.id) if event.type == "unit_finished"]
        assert any(restored), "a sub-model went on from its checkpoint"
