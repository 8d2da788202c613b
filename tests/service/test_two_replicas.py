"""Two processes of the service on one database are one service, also when one of them is killed in the middle."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import replica
from ray_standin import RayStandin, ray_standin
from receiver import Receiver, receiving
from reconciling import Scene

from service.database.session import Database

COUNT = 12
"""Runs, each of an owner of its own, because an owner has few active runs."""
_log = logging.getLogger(__name__)
SLACK = 6.0
"""Time that a busy machine may take in addition (s)."""


class Replica:
    """A process of the service with a state directory of its own."""

    def __init__(self, home: Path, name: str, options: list[str]) -> None:
        self.state, self.log = home / name, home / f"{name}.log"
        self._options = [*options, f"--state-dir={self.state}", "--port=0"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MOEDISCO_"))}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, replica.__file__, "serve", *self._options],
                stdout=log,
                stderr=log,
                env=environment | {"XDG_CONFIG_HOME": str(self.state), "PYTHONPATH": str(Path.cwd())},
            )

    @property
    def url(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.state / "service.pid").read_text().splitlines()
            if self.process is not None and len(lines) == 2 and lines[0] == str(self.process.pid):
                return lines[1]
        return None

    def gauge(self, name: str) -> float:
        """A metric of this replica."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    @property
    def holds(self) -> bool:
        return self.gauge("moedisco_lease_held") == 1

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


@pytest.fixture
def ray() -> Iterator[RayStandin]:
    with ray_standin() as found:
        found.pause = 0.05
        yield found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        found.pause = 0.05
        yield found


@pytest.fixture
def replicas(tmp_path: Path, database_url: str, ray: RayStandin, receiver: Receiver) -> Iterator[list[Replica]]:
    """Both start at the same moment, on a database that neither has seen."""
    options = [f"--database-url={database_url}", f"--ray-address={ray.url}", f"--output-root={tmp_path / 'runs'}"]
    options += [f"--max-active-runs={COUNT}", f"--webhook-url={receiver.url}"]
    found = [Replica(tmp_path, name, options) for name in ("a", "b")]
    try:
        for each in found:
            each.start()
        for each in found:
            until(lambda each=each: each.url is not None, 60, each)
        yield found
    finally:
        for each in found:
            each.stop()


def until(happened: Callable[[], bool], seconds: float, *shown: Replica) -> float:
    """Seconds until something happened."""
    began = time.monotonic()
    while not happened():
        logs = "\n".join(each.log.read_text()[-3000:] for each in shown)
        assert time.monotonic() - began < seconds, logs
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("seed", [int(word) for word in os.environ.get("REPLICA_SEEDS", "1").split()])
def test_a_killed_replica_is_replaced_within_its_term_and_nothing_happens_twice(
    replicas: list[Replica], database_url: str, tmp_path: Path, ray: RayStandin, receiver: Receiver, seed: int, caplog
):
    """It is killed while it admits runs, and again while it posts messages about their ends.

    One message may arrive twice: the one that was under way.
    """
    caplog.set_level(logging.INFO, __name__)
    drawn, term = random.Random(seed), replica.TERM
    with contextlib.closing(Database(database_url)) as database:
        scene = Scene.on(database, tmp_path)
        assert sorted(each.holds for each in replicas) == [False, True]
        scene.now = time.time()
        submitted = {scene.submit(f"owner-{number}") for number in range(COUNT)}
        first = next(each for each in replicas if each.holds)
        other = next(each for each in replicas if each is not first)
        time.sleep(drawn.uniform(0, 1.5))
        first.kill()
        admitted = len(ray.jobs.jobs)
        waited = until(lambda: len(ray.jobs.jobs) == COUNT and other.holds, term + SLACK, other)
        first.start()
        assert {scene.run(run_id).attempt for run_id in submitted} == {1}
        assert ray.jobs.submissions.keys() == {f"{run_id}-1" for run_id in submitted}
        until(lambda: first.url is not None, 60, first)
        assert not first.holds
        for name in list(ray.jobs.jobs):
            ray.jobs.ends(name, 2)
        until(lambda: bool(receiver.got), SLACK, other)
        time.sleep(drawn.uniform(0, 0.6))
        other.kill()
        posted = len(receiver.got)
        until(lambda: {run_id for run_id, _ in receiver.runs} == submitted, term + 2 * SLACK, first)
        until(lambda: first.gauge("moedisco_end_messages_waiting") == 0, SLACK, first)
        assert {scene.run(run_id).state for run_id in submitted} == {"failed"}
        counts = Counter(run_id for run_id, _ in receiver.runs)
        assert sum(counts.values()) <= COUNT + 1
        assert not ray.jobs.killed
        _log.info(
            "%d of %d admitted, then %.1f s; %d posted, %d in all", admitted, COUNT, waited, posted, counts.total()
        )
