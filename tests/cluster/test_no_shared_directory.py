"""A run on hosts that share only an S3 server; one host is cut off during training, and another joins."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import boto3
import pytest
from hosts import HIDDEN, HOME, PYTHON, Hosts, copy_checkout, finished, until
from ray_on_hosts import TOKEN, RayOnHosts
from s3_standin import KEYS, s3_server
from small_run import same_outcome, small_config
from step_account import attempts, lost

from moedisco_ray.core.records.events import EventLog
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

SEEDS = int(os.environ.get("CLUSTER_SEEDS", "1"))
INTERVAL = 10
"""Steps between two checkpoints."""
SUBNET = "10.78.31"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def hosts():
    base = Path(tempfile.mkdtemp(prefix="md", dir="/var/tmp"))
    hosts = Hosts(base, ("head", "low-0", "low-1", "late"), SUBNET, private=True)
    try:
        copy_checkout(hosts.checkout)
        hosts.start()
        yield hosts
    finally:
        hosts.stop()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="module")
def options(hosts):
    """Options of URIs at an S3 server that every host reaches, with text in one bucket."""
    with s3_server("runs", hosts.gateway) as server:
        store = boto3.client("s3")
        store.create_bucket(Bucket="text")
        for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
            store.upload_file(str(path), "text", f"code/{path.name}")
        yield f"endpoint_override={server}&scheme=http"


def configuration(output, options):
    """Four sub-models for two or three slots, so that some wait; each takes 10 s on a fast machine."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    source = {"path": f"s3://text/code/*.py?{options}", "documents": "paragraph", "format": "text", "name": "code"}
    return small_config(
        output,
        clusters={"count": 4},
        model={"config": sizes},
        corpus={"sources": [source]},
        tokens={"total": 2_200_000, "finetune_share": 0.05},
        pools={"low_memory": {"max_workers": 4}, "high_memory": {"workers": 1}},
        checkpoint={"every": INTERVAL},
    )


@pytest.fixture(scope="module")
def one_machine(options, tmp_path_factory):
    return pipeline.run(configuration(tmp_path_factory.mktemp("one"), options), backend=LocalBackend())


class Started:
    """A run, started on the head, whose events are read from its output."""

    def __init__(self, hosts, config, environment):
        file = hosts.home("head") / "config.json"
        file.write_text(config.model_dump_json(exclude_defaults=True))
        self._process = hosts.spawn(
            "head", PYTHON, "-m", "service", "run", f"{HOME}/config.json", "--json", RAY_ADDRESS="auto", **environment
        )

    def log(self):
        return self._process.log.read_text()

    def events(self):
        assert self._process.poll() in (None, 0), self.log()
        return list(EventLog.parse(self._process.log.read_bytes()))

    def nodes(self):
        """Address of the node of each unit's newest attempt."""
        return {event.unit: event.data["node"] for event in self.events() if event.type == "unit_started"}

    def steps_on(self, address):
        """Steps of the sub-model that trains on a node; 0 if none does."""
        events = self.events()
        done = {event.unit for event in events if event.type == "unit_finished"}
        mine = [unit for unit, node in self.nodes().items() if node == address and unit not in done]
        return max((e.data["step"] for e in events if e.type == "progress" and e.unit in mine), default=0)

    def finished(self):
        code, output = finished(self._process, 900)
        assert code == 0, output
        return self.events()


def test_hosts_share_no_directory(hosts):
    readable = {f"/tmp/{path.parts[2]}" for path in HIDDEN}
    for name in hosts.address:
        hosts.execute(name, "touch", f"/tmp/{name}", f"{HOME}/{name}", f"/dev/shm/{name}")
        assert hosts.execute(name, "bash", "-c", f"ls -d /tmp/* {HOME}/* /dev/shm/*").split() == sorted(
            [f"/tmp/{name}", *readable, f"{HOME}/moedisco", f"{HOME}/{name}", f"/dev/shm/{name}"]
        )
        for folder in ("/var/tmp", hosts.base, *HIDDEN, *(hosts.home(other) for other in hosts.address)):
            with pytest.raises(subprocess.CalledProcessError, match="1"):
                hosts.execute(name, "touch", f"{folder}/mark")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_node_is_cut_off_and_another_joins(hosts, options, one_machine, seed, tmp_path, monkeypatch):
    chance = random.Random(seed)
    cut_off, step = chance.choice(["low-0", "low-1"]), chance.randrange(INTERVAL, 4 * INTERVAL)
    ray = RayOnHosts(hosts, KEYS)
    ray.start("head", cpus=2, resources={"high_mem_gpu": 1})
    for name in ("low-0", "low-1"):
        ray.start(name, cpus=0, resources={"low_mem_gpu": 1})
    config = configuration(f"s3://runs/team-{seed}?{options}", options)
    run = Started(hosts, config, KEYS | TOKEN)

    until(lambda: run.steps_on(hosts.address[cut_off]) >= step, 600, run.log)
    hosts.unplug(cut_off)
    ray.start("late", cpus=0, resources={"low_mem_gpu": 1})
    until(lambda: hosts.address["late"] in run.nodes().values(), 300, run.log)
    until(lambda: any(event.type == "worker_restarted" for event in run.events()), 300, run.log)
    hosts.plug_in(cut_off)  # what still trains there is of an attempt that counts no more
    events = run.finished()

    restarts = [event for event in events if event.type == "worker_restarted"]
    assert [event.data["kind"] for event in restarts] == ["preempted"], restarts
    steps_lost = {unit: lost(each) for unit, each in attempts(events).items()}
    assert 0 <= sum(steps_lost[restarts[0].unit]) <= INTERVAL
    assert not any(sum(each) for unit, each in steps_lost.items() if unit != restarts[0].unit)
    assert Counter(event.unit for event in events if event.type == "unit_finished")[restarts[0].unit] == 1
    assert hosts.address[cut_off] not in ray.nodes()

    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    store = RunStore.of(config.location)
    store.fetch(*(store.directory / stage.directory for stage in STAGES), store.directory / "config.json")
    same_outcome(store.directory, one_machine)
    exported = sorted(path.name for path in (one_machine / "model").glob("*.safetensors"))
    assert exported
    for name in exported:
        assert (store.directory / "model" / name).read_bytes() == (one_machine / "model" / name).read_bytes()
    assert current_report(config.location).state == "finished"
