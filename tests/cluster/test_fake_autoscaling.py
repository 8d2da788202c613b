"""local-fake.yaml: a run without workers makes the low pool start, then the high one, and then both stop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import yaml
from cluster_files import FOLDER, load
from hosts import HOME, Hosts, until
from service_over_ssh import client_answers, slots
from small_run import small_config

from service.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
BIN = Path(sys.executable).parent
BOOT = 45
"""Seconds within which a node of this machine's comes, with room for a slow one; before any came, 300 are assumed."""
LAUNCH = re.compile(r"^(\S+ \S+),(\d+)\t.* -- (Adding|Removing) (\d+) node\S* of type (\w+)", re.MULTILINE)


@pytest.fixture
def host():
    # A host of its own, for `ray stop` ends all of Ray that it sees.
    base = Path(tempfile.mkdtemp(prefix="md", dir="/var/tmp"))
    hosts = Hosts(base, ("lab",), "10.78.7")
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()
        shutil.rmtree(base, ignore_errors=True)


def start(hosts, command):
    """Run a shell command on the host as its user would, in the background of the host."""
    hosts.execute("lab", "env", "-i", f"HOME={HOME}", f"PATH={BIN}:/usr/bin:/bin", "bash", "-c", command)


def configuration(hosts, name, tokens, workers):
    text = hosts.base / "text"
    text.mkdir(exist_ok=True)
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        shutil.copy(path, text)
    return small_config(
        Path("runs"),
        corpus={"sources": [{"path": f"{text}/*.py", "documents": "paragraph", "format": "text"}]},
        tokens={"seed_share": 0.02, "finetune_share": 0.4, **tokens},
        clusters={"count": 2, "vectors": "hidden_state"},
        pools={"low_memory": {"max_workers": 2}, "high_memory": {"workers": workers}},
    ).model_copy(update={"name": name, "output": Path("runs")})


def watch(client, run_id, timeline, seconds=900):
    """Record how many workers each pool has room for, at each change, until the run has ended and no worker is left."""
    deadline = time.monotonic() + seconds
    while True:
        there = slots(client)
        now = there.get("low_mem_gpu", 0) > 0, there.get("high_mem_gpu", 0) > 0
        if timeline[-1:] != [now]:
            timeline.append(now)
        if now == (False, False) and client.run(run_id).state in ("succeeded", "failed", "cancelled"):
            return
        assert time.monotonic() < deadline, timeline
        time.sleep(0.5)


def launches(hosts):
    """The autoscaler's decisions in its log: the time, the node type, and how many nodes more or fewer."""
    logs = sorted((hosts.base / "lab" / "tmp" / "ray").glob("session_2*/logs/monitor.log"))
    text = "".join(log.read_text() for log in logs)
    return [
        (
            time.mktime(time.strptime(moment, "%Y-%m-%d %H:%M:%S")) + int(milliseconds) / 1000,
            node_type,
            int(count) if verb == "Adding" else -int(count),
        )
        for moment, milliseconds, verb, count, node_type in LAUNCH.findall(text)
    ]


def check_launches(hosts, events, high):
    """Every node that came was needed when it was launched, and the gang's came once.

    One node has cores for all that needs a core. The seed needs one slot of the low pool, the two sub-models two, and
    what follows them none: merge, gang, evaluation and export are on the high pool. A node that was idle for too long
    between seed and sub-models may come again, but never while another one has room.
    """
    began = min(event.time for event in events)
    times = {event.type: event.time for event in events if event.stage == "submodels"}
    submodels, ended = times["stage_started"], times["stage_finished"]
    asks = min(event.time for event in events if event.type == "nodes_asked") - 5  # the event follows the request
    present, came = Counter(), Counter()
    for when, node_type, change in (changes := launches(hosts)):
        present[node_type] += change
        if change > 0 and when >= began:
            came[node_type] += change
            needed = {
                "cpu": 1,
                "low": 1 if when < submodels else 2 if when < ended else 0,
                "high": high if when >= asks else 0,
            }
            assert present[node_type] <= needed[node_type], (when, node_type, changes, submodels, ended, asks)
    assert came["high"] == high, changes


@contextlib.contextmanager
def served(host, *arguments):
    """A client of a service on the cluster of local-fake.yaml; the arguments are for `ray start`."""
    start(host, "ray get-auth-token --generate")
    start(host, shlex.join((f"{FOLDER}/local-fake.sh", *arguments)) + f" >{HOME}/ray.log 2>&1")
    with host.tunnel("lab", 8265) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/api/jobs/", timeout=60).status_code == 401, "Ray asks for the token"
    serve = (
        f"moedisco serve --ray-address http://127.0.0.1:8265 --output-root {host.base}/runs --input-root {host.base}"
    )
    start(host, f"setsid nohup {serve} >{HOME}/service.log 2>&1 </dev/null &")
    saved = host.home("lab") / ".config" / "moedisco" / "service.json"
    until(saved.exists, 120, "the service's address")
    with (
        host.tunnel("lab", 8300) as port,
        Client(f"http://127.0.0.1:{port}", json.loads(saved.read_text())["token"]) as client,
    ):
        until(lambda: client_answers(client), 60, "the service")
        yield client


def test_pools_come_with_the_work_and_go_after_it(host):
    with served(host) as client:
        # One high-memory node has the slots of merge and gang: at the hand-over from one to the other, no further one
        # is launched.
        check_launches(host, follow(client, configuration(host, "short", {"total": 200_000}, workers=1)), high=1)
        # The cluster knows now how long a node of the high pool takes, which is no minutes: this run asks later.
        events = follow(client, configuration(host, "long", {"total": 5_000_000, "finetune_share": 0.02}, workers=2))
        check_launches(host, events, high=1)
    left, since_start, to_end = asked(events)
    assert left < BOOT
    assert since_start > to_end
    assert to_end < 2 * BOOT


def test_a_gang_over_two_nodes_takes_those_that_were_asked_for_ahead(host):
    cluster = load("local-fake")
    # The pool may have more nodes than the gang needs.
    cluster["available_node_types"]["high"] |= {"resources": {"CPU": 0, "high_mem_gpu": 1}, "max_workers": 4}
    path = host.base / "two-nodes.yaml"
    path.write_text(yaml.safe_dump(cluster))
    with served(host, f"--autoscaling-config={path}") as client:
        check_launches(host, follow(client, configuration(host, "wide", {"total": 200_000}, workers=2)), high=2)


def follow(client, config):
    """Follow a run on a cluster without workers to its end; returns its events."""
    timeline = []
    assert not any(slots(client).values())
    run = client.submit(config)
    watch(client, run.id, timeline)
    finished = client.run(run.id)
    assert finished.state == "succeeded", (finished.reason, client.log(run.id))
    assert timeline[0] == (False, False)
    assert timeline[-1] == (False, False)
    assert timeline.index((True, False)) < next(i for i, (_, high) in enumerate(timeline) if high)
    events = [event for _, event in client.events(run.id, follow=False)]
    asked(events)
    return events


def asked(events):
    """When the nodes of a run's fine-tune were asked for.

    Returns:
        The seconds that its sub-models were expected to take from then on, those since the first of them began, and
        those until the last one ended.
    """
    *_, ask = [event for event in events if event.type == "nodes_asked"]
    began = min(event.time for event in events if event.type == "unit_started" and event.stage == "submodels")
    ended = max(event.time for event in events if event.type == "unit_finished" and event.stage == "submodels")
    assert (ask.stage, ask.data["pool"]) == ("submodels", "high_memory")
    assert began < ask.time < ended
    return ask.data["seconds"], ask.time - began, ended - ask.time
