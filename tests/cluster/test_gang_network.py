"""A gang on two hosts whose own names lead to the loopback, as Debian's and Ubuntu's installers write `/etc/hosts`."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
from hosts import PYTHON, Hosts, copy_checkout, finished
from ray_on_hosts import TOKEN, RayOnHosts
from small_run import small_config

from moedisco_ray.core.records.events import EventLog

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts():
    base = Path(tempfile.mkdtemp(prefix="md", dir="/var/tmp"))
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, base, ignore_errors=True)
        hosts = Hosts(base, ("one", "two"), "10.78.41", debian=True)
        copy_checkout(hosts.checkout)
        undo.callback(hosts.stop)
        hosts.start()
        yield hosts


def test_a_gang_on_debian_machines_forms_and_trains(hosts):
    """gloo must not listen where the host's own name leads.

    Before (a0c02aba): the fine-tune failed: "Gloo connectFullMesh failed ... Connection refused, remote=[127.0.1.1]".
    """
    assert hosts.execute("two", "getent", "hosts", "two").split()[0] == "127.0.1.1"
    ray = RayOnHosts(hosts)
    for name in ("one", "two"):
        ray.start(name, cpus=2, resources={"low_mem_gpu": 1, "high_mem_gpu": 1})
    config = small_config(
        hosts.base / "runs",
        tokens={"total": 60_000, "finetune_share": 0.4},
        pools={"high_memory": {"workers": 2}},
        checkpoint={"max_failures": 0},
    )
    file = hosts.base / "config.json"
    file.write_text(config.model_dump_json(exclude_defaults=True))
    code, output = finished(
        hosts.spawn("one", PYTHON, "-m", "service", "run", file, "--json", RAY_ADDRESS="auto", **TOKEN), 600
    )
    assert code == 0, output
    events = EventLog.read(config.directory / "events.jsonl")
    (gang,) = [event for event in events if event.type == "unit_started" and event.stage == "finetune"]
    assert gang.data["workers"] == 2
    assert [event.unit for event in events if event.type == "unit_finished" and event.stage == "finetune"]
