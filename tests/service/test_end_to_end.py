"""A run over REST on a local Ray: the service restarts at another port, the driver is killed, the model downloaded."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from listening import Listener, documented, listeners
from real_service import RealService, real_service
from small_run import same_outcome, small_config, undisturbed_run
from watched_run import Watcher

from moedisco_ray.core.records.events import Event
from service.client import Client
from service.ray_side.dashboard import Dashboard
from service.ray_side.local import LocalRay

VALUE = "wandb-very-secret-value"
pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RealService]:
    with real_service(tmp_path) as running:
        yield running


@pytest.mark.slow
def test_a_run_survives_service_and_driver(service: RealService, tmp_path: Path) -> None:
    with service.client() as client:
        config = small_config(tmp_path / "ignored", pools={"low_memory": {"max_workers": 1}})
        client.set_secret(client.identity().owner, "WANDB_API_KEY", VALUE)
        run = client.submit(config.model_copy(update={"output": Path("runs"), "secrets": ("WANDB_API_KEY",)}))
        watcher = Watcher(client, run.id)
        watcher.wait_for(lambda story: story.reached("submodels", 15))
        service.kill()
        service.move()  # the driver has to find it again
        service.start()
        watcher.wait_for(lambda story: story.reached("finetune", 15))
        check_sockets(service)
        [process.kill() for process in service.drivers(run.id)]
        seen = watcher.join()
        finished = client.wait(run.id)
        assert finished.state == "succeeded", (finished.reason, service.output.read_text())
        assert finished.attempt == 2
        assert [position for position, _ in seen] == list(range(finished.events))
        same_outcome(next((service.home / "runs").glob(f"{run.id}/small")), undisturbed_run())
        check_story(client, run.id, [event for _, event in seen])
        check_dashboard(service, run.id)
        check_secret(service)
        model = client.download(run.id, tmp_path / "model")
    assert service.stop() == 0
    reload(model)


def check_secret(service: RealService) -> None:
    """The value that the drivers got is in no file of the service, of its Ray and of the run, and no record of Ray."""
    local = LocalRay(service.home / "state")
    cluster, record = local.find(), local._record()
    assert cluster is not None
    assert record is not None
    with contextlib.closing(Dashboard(cluster.dashboard_url, cluster.token_path)) as dashboard:
        for records in ("jobs/", "v0/tasks?detail=1&limit=1000", "v0/actors?detail=1", "v0/runtime_envs?detail=1"):
            assert VALUE not in repr(dashboard.get(f"/api/{records}"))
    for folder in (service.home, Path(record.directory)):
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_size < 2**26:
                assert VALUE.encode() not in path.read_bytes(), path


def check_sockets(service: RealService) -> None:
    """Other machines reach no process of the service, of its Ray and of a run, as docs/security.md says.

    Before (af276e38): 8 programs, `gcs_server` and `raylet` among them, listened on all addresses or on one of the
    network.
    """
    rows = list(documented())

    def row_of(listener: Listener) -> int | None:
        for i, (programs, _) in enumerate(rows):
            if any(name in listener.program for name in programs):
                return i
        return None

    found = {listener: row_of(listener) for listener in listeners(service.home / "state", service.pid)}
    assert {listener: i for listener, i in found.items() if i is None or listener.address != rows[i][1]} == {}
    assert set(found.values()) == set(range(len(rows)))


def check_story(client: Client, run_id: str, events: list[Event]) -> None:
    states = [event.data["state"] for event in events if event.type == "state"]
    assert states == ["queued", "starting", "running", "queued", "starting", "running", "succeeded"]
    report = client.report(run_id)
    curves = {series.unit: series for series in client.metrics(run_id).series}
    assert set(curves) == {"submodel-0", "submodel-1", "finetune"} == set(report.curves)
    assert curves["finetune"].value == pytest.approx(report.curves["finetune"].loss)
    money = client.run(run_id).money
    paid = {stage.name: stage.training_worker_seconds for stage in report.stages}
    # The meter counts what was lost with the first driver as well.
    assert money.worker_seconds["high_memory"] > paid["finetune"]
    assert money.worker_seconds["low_memory"] > paid["submodels"]
    assert money.dollars == pytest.approx(
        (money.worker_seconds["low_memory"] * 0.35 + money.worker_seconds["high_memory"] * 2.28) / 3600
    )
    assert "worker 0 of 1" in client.log(run_id, "submodel-0.0")
    assert [unit.status for unit in client.units(run_id)] == ["done"] * 3
    assert client.pools().connected


def check_dashboard(service: RealService, run_id: str) -> None:
    """Ray shows the run's job, its data sets, and its trainings on their seats, under the run's name."""
    cluster = LocalRay(service.home / "state").find()
    assert cluster is not None
    with contextlib.closing(Dashboard(cluster.dashboard_url, cluster.token_path)) as dashboard:
        jobs = {job["submission_id"]: job for job in dashboard.get("/api/jobs/")}
        names = {attempt: jobs[f"{run_id}-{attempt}"]["metadata"]["job_name"] for attempt in (1, 2)}
        assert names == {1: "small", 2: "small (attempt 2)"}
        data = dashboard.get(f"/api/data/datasets/{jobs[f'{run_id}-1']['job_id']}")["datasets"]
        assert {entry["dataset"].partition("_")[0] for entry in data} == {"small-corpus", "small-cluster"}
        for unit in ("submodel-0", "submodel-1", "finetune"):
            found = dashboard.get(f"/api/v0/tasks?filter_keys=name&filter_predicates=%3D&filter_values=small-{unit}")
            assert {task["type"] for task in found["data"]["result"]["result"]} == {"ACTOR_TASK"}


def reload(model: Path) -> None:
    program = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m = M.from_pretrained(sys.argv[1]); t = T.from_pretrained(sys.argv[1]);"
        "print(t.decode(m.generate(**t('import', return_tensors='pt'), max_new_tokens=5)[0]))"
    )
    written = subprocess.run(
        [sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=True, timeout=100
    )
    assert written.stdout.startswith("import")
