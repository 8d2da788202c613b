"""A run on an S3 server: the same bits as in a directory, and it continues on a machine that has seen nothing of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from elsewhere import Elsewhere
from pinned_runs import config_of, results
from s3_standin import s3_server
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.locations import CACHE, cache_directory
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def config(home: Path) -> RunConfig:
    return config_of("qwen3_moe", home)


@pytest.fixture(scope="module")
def expected(config: RunConfig) -> dict[str, object]:
    return results(pipeline.run(config, backend=LocalBackend()))


@pytest.fixture
def at_uri(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with s3_server("runs") as server:
        yield config.model_copy(update={"output": f"s3://runs/team?endpoint_override={server}&scheme=http"})


def stopped_at(stop: StopFile, unit: str, step: int) -> pipeline.Emit:
    def listen(event: Event) -> None:
        if event.type == "progress" and event.unit == unit and event.data["step"] >= step:
            stop.request("cancelled")

    return listen


def test_a_run_at_a_uri_moves_from_machine_to_machine_with_the_same_bits(
    at_uri: RunConfig, expected: dict[str, object], tmp_path: Path
) -> None:
    store = RunStore.of(at_uri.location)
    for number, (unit, step) in enumerate([("seed", 10), ("submodel-1", 4), ("finetune", 8)]):
        stop = StopFile(tmp_path / f"stop-{number}")
        with pytest.raises(RunStopped):
            pipeline.run(at_uri, (stopped_at(stop, unit, step),), backend=LocalBackend(), stop=stop)
        assert current_report(at_uri.location).state == "stopped"
        shutil.rmtree(cache_directory())
    events: list[Event] = []
    directory = pipeline.run(at_uri, (events.append,), backend=LocalBackend())
    assert next(event.data["step"] for event in events if event.type == "progress") > 8
    store.fetch(directory / "model", directory / "report.json")
    assert results(directory) == expected
    assert [event.type for event in EventLog.parse(store.read("events.jsonl") or b"")].count("run_started") == 4

    listed = store.remote.list()
    assert not [name for name in listed if name.startswith(("checkpoints/", "receipts/", "corpus/train"))]
    shutil.rmtree(cache_directory())
    events.clear()
    pipeline.run(at_uri, (events.append,), backend=LocalBackend())
    assert [event.type for event in events if event.type.startswith("stage_")] == ["stage_skipped"] * 9
    assert current_report(at_uri.location).state == "finished"
    assert results_of_report(current_report(at_uri.location)) == expected["losses"]

    uri = str(at_uri.location)
    shown, drawn = (CliRunner().invoke(app, [command, uri]) for command in ("show", "plot"))
    assert shown.exit_code == drawn.exit_code == 0, (shown.output, drawn.output)
    assert "finetune" in shown.output
    assert store.read("figures/loss.png") is not None or "figures" in drawn.output


def test_work_on_machines_that_share_nothing_gives_the_same_bits(
    at_uri: RunConfig, expected: dict[str, object], tmp_path: Path
) -> None:
    with Elsewhere(tmp_path / "others") as backend:
        directory = pipeline.run(at_uri, backend=backend)
    held = {path.relative_to(directory).parts[0] for path in directory.rglob("*.safetensors")}
    # the driver's machine reads the seed, for clusters, and sync points
    assert not held & {"merged", "finetuned", "model"}
    assert not list(directory.rglob("optimizer_state"))
    assert not list((directory / "corpus" / "train").glob("*"))
    assert not [path for part in ("corpus", "clusters") for path in (directory / part / "shards").rglob("*.npy")]
    RunStore.of(at_uri.location).fetch(directory / "model", directory / "report.json")
    found = results(directory)
    assert found["weights"] == expected["weights"]
    assert found["perplexity"] == expected["perplexity"]


def results_of_report(report: object) -> dict[str, list[float]]:
    return {unit: curve.loss for unit, curve in report.curves.items()}  # type: ignore[attr-defined]
