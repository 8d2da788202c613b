"""Runs in buckets of Google Cloud and Azure, with the credentials of machines there: the same bits as in a directory.

A run at S3 has `test_run_at_uri.py` and more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dying_driver
import pytest
from azure_standin import azure_server
from gcs_standin import gcs_server
from identity_standin import identities
from pinned_runs import config_of, results
from pyarrow import fs
from ray.train.v2._internal.execution.storage import StorageContext
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError, StorageError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.locations import CACHE, Location, cache_directory, joined
from moedisco_ray.core.store.manifests import DRAFTS
from moedisco_ray.core.store.remote import Remote
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray.train_storage import train_storage
from service.domain.starts import located
from service.run_storage import documents_at, read, storage_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

UNIT, STEP = "finetune", 21
"""When the driver dies: the checkpoint of step 20 waited until that of step 10 was stored."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def config(home: Path) -> RunConfig:
    return config_of("qwen3_moe", home)


@pytest.fixture(scope="module")
def expected(config: RunConfig) -> dict[str, Any]:
    """What the run gives in a directory, and what a run gives that starts from it."""
    directory = pipeline.run(config, backend=LocalBackend())
    after = pipeline.run(starting_from(config, directory), backend=LocalBackend())
    return {"first": results(directory), "second": results(after)["weights"]}


@pytest.fixture(scope="module", params=["gs", "abfs"])
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a bucket, whose clients find their credentials as on a machine of that cloud."""
    folder = tmp_path_factory.mktemp("cloud")
    with identities():
        if request.param == "abfs":
            with azure_server("runs", folder) as uri:
                yield uri
        else:
            with gcs_server("runs") as uri:
                yield uri.replace("anonymous@", "")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


def starting_from(config: RunConfig, first: Location) -> RunConfig:
    """The configuration of a run that a service starts from the model and the text of a finished one."""
    raw = config.model_dump(mode="json") | {"name": "second", "seed": 1}
    raw["model"] = {"family": config.model.family, "init": {"checkpoint": "run://FIRST/model"}}
    raw["corpus"]["sources"] = [{"path": "run://FIRST/corpus"}]
    raw["tokens"] |= {"seed_share": 0.0}
    raw["clusters"] |= {"vectors": "tfidf_svd"}
    return located(RunConfig.model_validate(raw), {"FIRST": first}.get, documents_at)[0]


def command(*words: Location) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same bits; the last losses before the kill may not have reached the bucket."""
    assert (found["weights"], found["perplexity"]) == (expected["weights"], expected["perplexity"])
    assert found["losses"].keys() == expected["losses"].keys()
    for unit, losses in expected["losses"].items():
        assert set(found["losses"][unit]) <= set(losses)
    assert found["losses"][UNIT][-1] == expected["losses"][UNIT][-1]


def test_a_run_is_killed_resumed_read_and_started_from(
    bucket: str, config: RunConfig, expected: dict[str, Any], tmp_path: Path
) -> None:
    config = config.model_copy(update={"output": joined(bucket, "team", "runs")})
    place, store = config.location, RunStore.of(config.location)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    died = subprocess.run(
        [sys.executable, dying_driver.__file__, tmp_path / "config.json", UNIT, str(STEP)], check=False
    )
    assert died.returncode == -signal.SIGKILL
    shutil.rmtree(cache_directory())
    assert "submodels" in command("show", place)

    events: list[Event] = []
    directory = pipeline.run(config, (events.append,), backend=LocalBackend())
    begun = {event.unit: event.data["step"] for event in reversed(events) if event.type == "progress"}
    assert begun.keys() == {UNIT}
    assert begun[UNIT] > 10
    store.fetch(directory / "model", directory / "report.json")
    check_same(results(directory), expected["first"])
    names = set(store.remote.list())
    assert not {name.partition("/")[0] for name in names} & {"checkpoints", "receipts"}
    assert not store.remote.system.get_file_info(fs.FileSelector(store.remote.path(DRAFTS), allow_not_found=True))

    shutil.rmtree(cache_directory())
    events.clear()
    pipeline.run(config, (events.append,), backend=LocalBackend())
    assert [event.type for event in events if event.type.startswith("stage_")] == ["stage_skipped"] * len(STAGES)
    # Only the model's card is written again.
    written = {name for name in {*store.remote.list()} - names if name.startswith("objects/")}
    assert {Path(name).name for name in written} <= {"README.md"}

    shutil.rmtree(cache_directory())
    assert current_report(place).state == "finished"
    assert "finetune" in command("show", place)
    assert "loss" in command("plot", place)
    command("export", place, "--output", tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    weights = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert weights == expected["first"]["weights"]
    (tmp_path / "text.txt").write_text("abc def " * 300)
    judged = command("evaluate", joined(place, "model"), "--sources", tmp_path / "text.txt", "--json")
    assert json.loads(judged)["unseen"]["perplexity"] > 1

    for name, sha256 in weights.items():
        content = read(storage_of(place), f"model/{name}")
        assert content is not None
        assert hashlib.sha256(content).hexdigest() == sha256
    shown = {file.path for file in storage_of(place).files()}
    assert {"report.json", "events.jsonl", "model/config.json", "figures/loss.png"} <= shown

    shutil.rmtree(cache_directory())
    second = starting_from(config, place)
    after = pipeline.run(second, backend=LocalBackend())
    RunStore.of(second.location).fetch(after / "model", after / "report.json")
    assert results(after)["weights"] == expected["second"]
    store.remote.delete_folder("")
    assert not store.remote.list()
    assert current_report(second.location).state == "finished"


def test_a_reader_sees_an_object_as_it_was_or_as_it_is(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote(joined(bucket, "team", "objects"), "output")
    versions = [bytes([number]) * 1000 for number in range(30)]
    remote.write("report.json", versions[0])
    writer = threading.Thread(target=lambda: [remote.write("report.json", data) for data in versions])
    writer.start()
    found = []
    while writer.is_alive():
        found.append(remote.read("report.json"))
    assert found == sorted(found, key=versions.index)
    assert remote.list() == {"report.json": 1000}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_storage_of_a_gang_travels_to_its_workers(bucket: str) -> None:
    place = joined(bucket, "team", "gang")
    path, system = train_storage(place)
    StorageContext(path, "finetune", storage_filesystem=pickle.loads(pickle.dumps(system)))
    assert list(Remote(place, "checkpoint.storage").list()) == ["finetune/.validate_storage_marker"]


def test_a_bucket_that_does_not_exist_is_one_clear_line(bucket: str) -> None:
    remote = Remote(joined(bucket.replace("runs", "none", 1), "team"), "output")
    assert remote.read("config.json") is None
    with pytest.raises(ConfigError, match=r"^output: .* cannot be used \(.*\); name a location that you may write to$"):
        remote.write("config.json", b"{}")


def test_a_machine_without_a_credential_gets_one_clear_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDENTITY_HEADER", "another machine's")
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
    monkeypatch.setenv("PATH", "/nowhere")  # where Azure's command-line client may be
    with pytest.raises((ConfigError, StorageError), match=r"credential|access token"):
        Remote(joined(bucket, "team"), "output", ()).read("config.json")
