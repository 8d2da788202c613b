"""A service is backed up under load, is lost, and continues from the backup elsewhere; its runs do not notice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import demo
from databases import postgresql_database, whole_stream
from ray_standin import RayStandin, ray_standin
from reconciling import FINISH, START, Scene
from test_two_replicas import SLACK, Replica, until

from moedisco_ray.cli.reporter import Reporter
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stop_file import StopFile
from service.client import Client, RetryPolicy
from service.database.session import Database
from service.domain.run_paths import RunPaths
from service.schemas import DatasetInfo

DRIVERS = 3
_log = logging.getLogger(__name__)


class Driver:
    """Writes events to its log, which the driver's own reporter sends to wherever the service is."""

    def __init__(self, place: RunPaths) -> None:
        self._place, self._end = place, threading.Event()
        self.events: list[Event] = []
        place.events.parent.mkdir(parents=True, exist_ok=True)
        self._reporter = Reporter(place.report_to(1), place.events, StopFile(place.stop_file(1)))
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _write(self, event: Event) -> None:
        self.events.append(dataclasses.replace(event, time=time.time()))
        with self._place.events.open("a", encoding="utf-8") as file:
            file.write(self.events[-1].to_json() + "\n")
        self._reporter(event)

    def _train(self) -> None:
        hold = {"hold": "h", "pool": "low_memory", "workers": 2}
        self._write(START)
        self._write(Event("stage_started", "submodels"))
        self._write(Event("unit_started", "submodels", "submodel-0", {"steps": 10**6, "workers": 1, "node": "n"}))
        self._write(Event("workers_held", "submodels", "submodel-0", hold))
        step = 0
        while not self._end.wait(0.01):
            figures = {"steps": 10**6, "tokens": 10 * step, "loss": 3.0, "tokens_per_second": 9.0}
            self._write(Event("progress", "submodels", "submodel-0", {"step": step, **figures}))
            step += 1

    def end(self) -> None:
        """As a driver that has finished."""
        self.stop()
        self._write(FINISH)
        self._reporter.close()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


class Load:
    """Someone who submits, cancels and lists runs without a pause.

    Attributes:
        runs: Id of each run by its idempotency key, in the order of the requests.
        seconds: When each request began, and what it took.
    """

    def __init__(self, client: Client) -> None:
        self._client, self._end = client, threading.Event()
        self.runs: dict[str, str] = {}
        self.seconds: list[tuple[float, float]] = []
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._end.wait(0.02):
                key = f"key-{len(self.runs)}"
                self.runs[key] = self._timed(lambda key=key: self._client.submit(demo(), idempotency_key=key)).id
                self._timed(lambda: list(self._client.runs(name="demo"))[:1])
                if len(self.runs) % 2:
                    self._timed(lambda key=key: self._client.cancel(self.runs[key]))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            self.errors.append(error)

    def _timed(self, asked: Callable[[], Any]) -> Any:
        began = time.monotonic()
        answer = asked()
        self.seconds.append((began, time.monotonic() - began))
        return answer

    def slowest(self, first: float, last: float) -> float:
        return max(took for began, took in self.seconds if first <= began + took and began <= last)

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def ray() -> Iterator[RayStandin]:
    with ray_standin() as found:
        yield found


@pytest.fixture
def elsewhere(database_url: str, tmp_path: Path) -> Iterator[str]:
    """Of another database of the same kind, which is empty."""
    if database_url.startswith("postgresql"):
        with postgresql_database() as url:
            yield url
    else:
        (tmp_path / "elsewhere").mkdir()
        yield f"sqlite:///{tmp_path / 'elsewhere' / 'service.sqlite3'}"


def command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "service", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def client_of(service: Replica) -> Client:
    address = json.loads((service.state / "moedisco" / "service.json").read_text(encoding="utf-8"))
    return Client(address["url"], address["token"], retry=RetryPolicy(seconds=0))


@dataclasses.dataclass
class Lost:
    """A service that was killed some time after it was backed up.

    Attributes:
        drivers: Of the runs that were under way, by their ids.
        known: Number of events that the service had of each of these runs when it was killed.
        load: What else it was asked before.
        dataset: A data set that it had before the backup.
    """

    drivers: dict[str, Driver]
    known: dict[str, int]
    load: Load
    dataset: DatasetInfo


def lose(first: Replica, database_url: str, home: Path, ray: RayStandin, stack: contextlib.ExitStack) -> Lost:
    """Start a service, back it up into `home` while it is asked this and that, and kill it a while later."""
    first.start()
    until(lambda: first.url is not None, 60, first)
    client, text, drivers = client_of(first), home / "a.txt", {}
    text.write_text("a text that people upload\n" * 100)
    dataset = client.upload_dataset(text, "wiki")
    database = stack.enter_context(contextlib.closing(Database(database_url)))
    scene = Scene.on(database, home)
    scene.now = time.time()
    begun = [scene.submit(f"owner-{number}") for number in range(DRIVERS)]
    until(lambda: len(ray.jobs.jobs) >= DRIVERS, 30, first)
    for run_id in begun:
        ray.jobs.runs(scene.job(run_id))
        drivers[run_id] = Driver(scene.place(run_id))
        stack.callback(drivers[run_id].stop)
    load = Load(client)
    stack.callback(load.stop)
    time.sleep(2)
    began = time.monotonic()
    command("backup", str(home / "backup.tar.gz"), f"--state-dir={first.state}", f"--database-url={database_url}")
    ended = time.monotonic()
    time.sleep(1.5)
    load.stop()
    assert not load.errors
    calm, busy = load.slowest(began - 1, began), load.slowest(began, ended)
    _log.info("slowest request %.3f s, during the backup of %.1f s %.3f s", calm, ended - began, busy)
    first.kill()
    return Lost(drivers, {run_id: scene.run(run_id).next_seq for run_id in begun}, load, dataset)


def check_requests(client: Client, lost: Lost) -> None:
    """A request with a key from before the backup makes no second run; the runs from after it are unknown."""
    assert client.dataset(lost.dataset.id).hash == lost.dataset.hash
    stored = {run.id for run in client.runs()}
    keys = [key for key, run_id in lost.load.runs.items() if run_id in stored]
    assert 0 < len(keys) < len(lost.load.runs)
    assert keys == list(lost.load.runs)[: len(keys)]
    assert client.submit(demo(), idempotency_key=keys[-1]).id == lost.load.runs[keys[-1]]


def check_run(scene: Scene, run_id: str, driver: Driver) -> None:
    """All events of the driver are there, once and in order, and the spending is theirs."""
    run, meter = scene.run(run_id), Meter()
    found = whole_stream(scene.database, run)
    assert [event.position for event in found] == list(range(run.next_position))
    steps = [event.data["step"] for event in found if event.type == "progress"]
    assert steps == [event.data["step"] for event in driver.events if event.type == "progress"]
    for event in driver.events:
        meter.update(event)
    assert run.worker_seconds == pytest.approx(meter.worker_seconds)


@pytest.mark.slow
def test_runs_continue_from_a_backup_that_was_made_under_load(
    database_url: str, elsewhere: str, tmp_path: Path, ray: RayStandin, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, __name__)
    options = [f"--ray-address={ray.url}", f"--output-root={tmp_path / 'runs'}", "--requests-per-minute=1000000"]
    first = Replica(tmp_path, "first", [*options, f"--database-url={database_url}"])
    second = Replica(tmp_path, "second", [*options, f"--database-url={elsewhere}"])
    with contextlib.ExitStack() as stack:
        stack.callback(second.stop)
        stack.callback(first.stop)
        lost = lose(first, database_url, tmp_path, ray, stack)
        command("restore", f"{tmp_path}/backup.tar.gz", f"--state-dir={second.state}", f"--database-url={elsewhere}")
        scene = Scene.on(stack.enter_context(contextlib.closing(Database(elsewhere))), tmp_path)
        assert all(0 < scene.run(run_id).next_seq < known for run_id, known in lost.known.items())
        second.start()
        until(lambda: second.url is not None, 60, second)
        client = client_of(second)
        check_requests(client, lost)
        for run_id, driver in lost.drivers.items():
            until(lambda run_id=run_id: scene.run(run_id).next_seq > lost.known[run_id], 10 + SLACK, second)
            driver.end()
            ray.jobs.ends(f"{run_id}-1")
        until(lambda: {scene.run(run_id).state for run_id in lost.drivers} == {"succeeded"}, 20 + SLACK, second)
        for run_id, driver in lost.drivers.items():
            check_run(scene, run_id, driver)
            # Someone who had followed further than the backup knew gets an end.
            assert not list(client.events(run_id, after=scene.run(run_id).next_position + 1000))
        assert not [name for name in ray.jobs.submissions if name.endswith("-2")]
        assert not set(ray.jobs.killed) & {f"{run_id}-1" for run_id in lost.drivers}
