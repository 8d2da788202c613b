"""Runs whose `output` is on an S3 server: submitted, started, read, continued, measured and removed by the service."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from api_client import PlanningHere, Service, demo, service
from pydantic import ValidationError
from reconciling import FINISH, Scene
from s3_standin import s3_server

from moedisco_ray.core.config import Source, check_config
from moedisco_ray.core.errors import CorpusError, StorageError
from moedisco_ray.core.store.locations import CACHE, parent
from moedisco_ray.core.store.read_roots import reading_within
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.sources import input_identity
from service import run_storage
from service.api import live_reports
from service.background.housekeeping import Housekeeping
from service.database import policies, runs
from service.database.session import Database
from service.domain.policies import Policy, Retention
from service.domain.states import RunState
from service.errors import NotFound
from service.run_storage import UriRun, copy_model_files, read, storage_of
from service.settings import Settings

WEIGHTS = bytes(range(256)) * 8
OUTPUT = "s3://runs/team"
DAY = 24 * 3600.0
SIZES = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 9000,
}


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with s3_server("runs") as address:
        yield address


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Service]:
    with service(tmp_path, PlanningHere(), output_roots=(OUTPUT,)) as made:
        yield made


def store_of(location: str) -> RunStore:
    """The run's files as its driver sees them."""
    return RunStore.of(location)


def fill(store: RunStore) -> None:
    """What a driver has written of a finished run: loose files and committed directories."""

    def commit(name: str, **files: bytes) -> None:
        draft = store.draft(store.directory / name)
        for file, content in files.items():
            path = draft / file.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        store.replace(draft, store.directory / name, {})

    def table(text: str) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": [text]}), buffer)
        return buffer.getvalue()

    commit("model", config_json=b"{}", weights_safetensors=WEIGHTS)
    commit("clusters", report_json=b'{"silhouette": 0.5}')
    commit("figures", loss_png=b"png")
    commit(
        "corpus", train__0_parquet=table("seen"), validation__0_parquet=table("unseen"), tokenizer__tokenizer_json=b"{}"
    )
    for name, content in {"ray.log": b"one\ntwo\n", "logs/submodel-0.0.log": b"a\nb", "events.jsonl": b""}.items():
        store.remote.write(name, content)


def submitted(made: Service) -> tuple[str, RunStore]:
    run_id = made.submit(output=f"{OUTPUT}/moe")["id"]
    store = store_of(f"{OUTPUT}/moe/{run_id}/demo")
    fill(store)
    return run_id, store


def get(made: Service, run_id: str, path: str, **headers: str):
    return made.ann.get(f"/v1/runs/{run_id}/{path}", headers=headers)


def test_everything_of_a_run_is_read_from_its_uri(here: Service):
    run_id, store = submitted(here)
    items = {item["path"]: item["bytes"] for item in get(here, run_id, "artifacts").json()["items"]}
    assert {path: items[path] for path in ("model/weights.safetensors", "figures/loss.png", "ray.log")} == {
        "model/weights.safetensors": len(WEIGHTS),
        "figures/loss.png": 3,
        "ray.log": 8,
    }
    assert not [path for path in items if path.startswith(("objects", "receipts", "."))]
    assert get(here, run_id, "artifacts/figures/loss.png").content == b"png"
    part = get(here, run_id, "artifacts/model/weights.safetensors", Range="bytes=10-19")
    assert (part.status_code, part.content) == (206, WEIGHTS[10:20])
    assert get(here, run_id, "artifacts/model/absent").status_code == 404
    assert get(here, run_id, "clusters").json() == {"silhouette": 0.5}
    assert [log["name"] for log in get(here, run_id, "logs").json()["items"]] == ["driver", "submodel-0.0"]
    assert get(here, run_id, "logs/driver?tail=1").text == "two\n"
    assert get(here, run_id, "report").json()["name"] == "demo"
    assert not store.directory.joinpath("report.json").exists()


def test_the_model_is_one_archive_that_can_be_resumed(here: Service):
    run_id, _ = submitted(here)
    whole = get(here, run_id, "model.tar")
    with tarfile.open(fileobj=io.BytesIO(whole.content)) as archive:
        assert archive.getnames() == ["demo/config.json", "demo/manifest.json", "demo/weights.safetensors"]
        assert archive.extractfile("demo/weights.safetensors").read() == WEIGHTS
    rest = get(here, run_id, "model.tar", **{"Range": "bytes=600-", "If-Range": whole.headers["etag"]})
    assert (rest.status_code, rest.content) == (206, whole.content[600:])


def test_a_log_is_followed_over_new_versions_of_its_object(here: Service):
    _, store = submitted(here)
    with contextlib.closing(storage_of(store.location).open("ray.log")) as file:
        assert file.read_at(0, 100) == b"one\ntwo\n"
        assert file.read_at(8, 100) == b""
        store.remote.write("ray.log", b"one\ntwo\nthree\n")
        assert file.read_at(8, 100) == b"three\n"


def test_a_manifest_cannot_name_objects_of_other_runs(here: Service):
    run_id, store = submitted(here)
    store.remote.write("../other/secret", b"secret")
    for number, place in enumerate(["../other/secret", "objects/../../other/secret", "ray.log"]):
        store.remote.write(f"planted{number}/manifest.json", json.dumps({"files": {"x": [6, "", place]}}).encode())
        assert get(here, run_id, f"artifacts/planted{number}/x").status_code == 404
    paths = [item["path"] for item in get(here, run_id, "artifacts").json()["items"]]
    assert not [path for path in paths if path.endswith("/x")]


def test_a_bucket_that_hangs_holds_up_its_own_report_alone(here: Service, monkeypatch: pytest.MonkeyPatch):
    """Others who ask for the same report are refused; `test_live_reports` asks for other ones."""
    slow = submitted(here)[0]
    monkeypatch.setattr(live_reports, "PATIENCE_SECONDS", 0.2, raising=False)
    with ThreadPoolExecutor(2) as readers, socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        run_storage._store.cache_clear()
        waiting = readers.submit(get, here, slow, "report")
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)
            answer = readers.submit(get, here, slow, "report").result(10)
            silent.close()
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    assert (answer.status_code, answer.json()["type"].rpartition(":")[2]) == (503, "overloaded")
    assert (waiting.result().status_code, waiting.result().json()["type"].rpartition(":")[2]) == (
        503,
        "storage-unavailable",
    )


ELSEWHERE = (
    "s3://runs",
    "s3://runs/team2",
    "s3://runs/team/../x",
    "s3://runs/team/%2e%2e/x",
    "s3://other/x",
    "gs://runs/team",
    "file:///etc",
    "s3://runs/team/.removed",
    "s3://runs/team//x",
    "s3://runs/team/a*",
    "s3://runs/team?region=us-east-1",
    "s3://runs/team/01JDB5W3XQ3N8QZ7V0G6M4T9KE/demo",
)


def test_an_output_elsewhere_or_in_another_run_is_refused(here: Service):
    for output in ELSEWHERE:
        answer = here.ann.post("/v1/runs", json={"config": demo(output=output)})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "config.output"), output


def test_a_service_without_a_bucket_keeps_runs_in_directories(tmp_path: Path):
    with service(tmp_path, storage_roots=(OUTPUT,)) as made:
        answer = made.ann.post("/v1/runs", json={"config": demo(output=OUTPUT)})
        assert "--output-root" in answer.json()["errors"][0]["message"]


def test_a_service_without_directories_keeps_runs_in_the_bucket(here: Service):
    run = here.submit()
    assert run["config"]["output"] == f"{OUTPUT}/{run['id']}"
    answer = here.ann.post("/v1/runs", json={"config": demo(output=str(here.settings.state_dir / "runs"))})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "config.output")


def test_drivers_of_another_user_need_a_directory(tmp_path: Path):
    with pytest.raises(ValidationError, match="name a directory for them with --home-dir"):
        Settings(state_dir=tmp_path, output_roots=(OUTPUT,), driver_user="nobody")
    Settings(state_dir=tmp_path, output_roots=(OUTPUT,), driver_user="nobody", home_dir=tmp_path / "homes")


def test_the_directory_of_the_services_own_files_is_no_place_for_runs(tmp_path: Path):
    homes = tmp_path / "homes"
    with service(tmp_path, output_roots=(OUTPUT,), home_dir=homes) as made:
        run = made.submit()
        assert run["config"]["output"] == f"{OUTPUT}/{run['id']}"
        assert made.directory(run["id"]).parent == homes / run["id"]
        for output in ("results", str(homes), str(homes / "x")):
            answer = made.ann.post("/v1/runs", json={"config": demo(output=output)})
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "config.output")


def test_a_retry_goes_to_the_same_place(here: Service):
    run_id, _ = submitted(here)
    again = here.ann.post(f"/v1/runs/{run_id}/retry").json()
    assert again["config"]["output"] == f"{OUTPUT}/moe/{again['id']}"


def test_a_run_starts_from_the_corpus_and_the_model_at_a_uri(here: Service):
    run_id, store = submitted(here)
    here.start(run_id)
    here.bring(run_id, RunState.SUCCEEDED)
    assert here.submit(corpus={"sources": [{"path": f"run://{run_id}/corpus"}]})["config"]["corpus"]["sources"][0][
        "path"
    ] == (f"run://{run_id}/corpus")
    config = demo(model={"init": {"checkpoint": f"run://{run_id}/model"}}, tokens={"seed_share": 0})
    answer = here.ann.post("/v1/runs", json={"config": config})
    # as `fill` has written it
    assert (answer.status_code, "has a config.json without model_type" in answer.text) == (422, True)
    model = store.directory / "model"
    (model / "config.json").write_text(json.dumps(SIZES))
    store.publish(model)
    asked = here.submit(model={"init": {"checkpoint": f"run://{run_id}/model"}}, tokens={"seed_share": 0})["config"]
    assert asked["model"]["init"]["checkpoint"] == f"run://{run_id}/model"


def test_the_files_of_a_hostile_model_are_not_written_elsewhere(here: Service, tmp_path: Path):
    _, store = submitted(here)
    store.remote.write(
        "model/manifest.json",
        json.dumps(
            {
                "files": {
                    "config.json": [2, "", "objects/x/config.json"],
                    "../../planted": [2, "", "objects/x/config.json"],
                }
            }
        ).encode(),
    )
    store.remote.write("objects/x/config.json", b"{}")
    assert copy_model_files(store.location, tmp_path / "scratch").joinpath("config.json").read_text() == "{}"
    assert not list(tmp_path.rglob("planted"))
    assert not list(tmp_path.parent.glob("planted"))
    with pytest.raises(StorageError, match="outside of itself"):
        store.fetch(store.directory / "model")


def test_a_driver_finds_the_documents_its_working_copy_and_its_place(database: Database, tmp_path: Path):
    scene = Scene.on(database, tmp_path, output_roots=(OUTPUT,), home_dir=tmp_path / "runs")
    first = scene.submit(output=OUTPUT)
    fill(store_of(f"{OUTPUT}/{first}/demo"))
    scene.change(first, RunState.STARTING, attempt=1)
    scene.change(first, RunState.SUCCEEDED)
    store = store_of(f"{OUTPUT}/{first}/demo")
    (store.directory / "model" / "config.json").write_text(json.dumps(SIZES))
    store.publish(store.directory / "model")
    second = scene.submit(
        output=OUTPUT,
        corpus={"sources": [{"path": f"run://{first}/corpus"}]},
        tokens={"seed_share": 0},
        model={"init": {"checkpoint": f"run://{first}/model"}},
    )
    scene.round()
    (job,) = scene.jobs.submissions.values()
    asked = json.loads(job.config_path.read_text())
    assert asked["output"] == f"{OUTPUT}/{second}"
    assert job.config_path == tmp_path / "runs" / second / "request.json"
    assert asked["model"]["init"]["checkpoint"] == f"{OUTPUT}/{first}/demo/model"
    assert {f"{OUTPUT}/{second}/demo", f"{OUTPUT}/{first}/demo/model"} <= set(map(str, job.read_roots.own))
    listed = list_files("corpus.sources.0", Source(path=asked["corpus"]["sources"][0]["path"]))
    assert [file.path.split("/")[-2:] for file in listed.files] == [["train", "0.parquet"], ["validation", "0.parquet"]]


def test_events_that_were_not_reported_come_from_the_uri(database: Database, tmp_path: Path):
    scene = Scene.on(database, tmp_path, output_roots=(tmp_path / "runs", OUTPUT))
    run_id = scene.running(output=OUTPUT)
    log = scene.place(run_id).events.read_bytes() + FINISH.to_json().encode() + b"\n"
    store_of(f"{OUTPUT}/{run_id}/demo").remote.write("events.jsonl", log)
    scene.jobs.ends(scene.job(run_id))
    scene.round()
    assert scene.run(run_id).state == "succeeded"


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_run_whose_bucket_is_gone_can_be_killed(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scene = Scene.on(database, tmp_path, output_roots=(tmp_path / "runs", OUTPUT))
    run_id = scene.running(output=OUTPUT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    run_storage._store.cache_clear()
    scene.change(run_id, RunState.STOPPING, stop="cancelled")
    scene.jobs.ends(scene.job(run_id), exit_code=1)
    scene.round()
    assert (scene.run(run_id).state, "does not answer" in scene.run(run_id).reason) == ("stopping", True)
    with scene.database.write() as session:
        runs.amend(session, runs.lock(session, run_id), now=scene.now, stop="killed")
    scene.round()
    assert (scene.run(run_id).state, scene.run(run_id).reason) == ("cancelled", "cancelled; its driver was killed")


@pytest.mark.parametrize("started", [True, False])
def test_retention_measures_and_deletes_the_objects(database: Database, tmp_path: Path, started: bool):
    scene = Scene.on(database, tmp_path, output_roots=(tmp_path / "runs", OUTPUT))
    run_id, other = scene.submit(output=OUTPUT), scene.submit(output=OUTPUT)
    if started:  # with a home on this machine
        scene.round()
    else:
        scene.change(run_id, RunState.STARTING, attempt=1)
    store = store_of(f"{OUTPUT}/{run_id}/demo")
    fill(store)
    store_of(f"{OUTPUT}/{other}/demo").remote.write("ray.log", b"x")
    scene.change(run_id, RunState.SUCCEEDED)
    with scene.database.write() as session:
        policies.put(session, "ann", Policy(retention=Retention(days=30)), scene.now)
    tidy = Housekeeping(scene.database, scene.jobs, scene.settings.roots, 3600.0)
    tidy.round(scene.now)
    assert scene.run(run_id).disk_bytes >= sum(store.remote.list().values()) > len(WEIGHTS)
    scene.now += 40 * DAY
    tidy.round(scene.now)
    with scene.database.read() as session:
        assert runs.get(session, run_id) is None
    assert store.remote.list() == {}
    assert list(store_of(f"{OUTPUT}/{other}/demo").remote.list()) == ["ray.log"]


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_objects_that_could_not_be_deleted_are_deleted_in_the_next_round(
    database: Database, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
):
    scene = Scene.on(database, tmp_path, output_roots=(tmp_path / "runs", OUTPUT))
    run_id = scene.submit(output=OUTPUT)
    scene.round()
    store = store_of(f"{OUTPUT}/{run_id}/demo")
    fill(store)
    scene.change(run_id, RunState.SUCCEEDED)
    with scene.database.write() as session:
        policies.put(session, "ann", Policy(retention=Retention(days=30)), scene.now)
    tidy = Housekeeping(scene.database, scene.jobs, scene.settings.roots, 3600.0)
    tidy.round(scene.now)
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        tidy.round(scene.now + 40 * DAY)
    assert store.remote.list()
    tidy.round(scene.now + 40 * DAY)
    assert store.remote.list() == {}
    assert not list((tmp_path / "runs").glob(".removed-*"))


def test_deleting_a_run_deletes_its_objects(here: Service):
    run_id, store = submitted(here)
    assert here.ann.post(f"/v1/runs/{run_id}/cancel").json()["state"] == "cancelled"
    assert here.ann.delete(f"/v1/runs/{run_id}").status_code == 204
    assert RunStore.of(parent(store.location)[0]).remote.list() == {}


def test_a_file_that_is_too_large_is_not_read_whole(here: Service):
    _, store = submitted(here)
    assert read(UriRun(store), "ray.log", 8) == b"one\ntwo\n"
    with pytest.raises(NotFound, match="larger"):
        read(UriRun(store), "ray.log", 7)


def test_runs_read_a_copy_of_a_data_set(here: Service, tmp_path: Path) -> None:
    files = {"a.txt": b"text", "deep/b.txt": b"", "deep/c.txt": b"text" * 1000}
    dataset = here.upload("wiki", files)
    copy = f"{OUTPUT}/.datasets/files/{dataset['hash']}"
    remote = RunStore.of(copy).remote
    assert remote.list() == {name: len(content) for name, content in files.items()}
    assert remote.read("deep/c.txt") == files["deep/c.txt"]
    run = here.submit(corpus={"sources": [{"path": "dataset://wiki"}]})
    assert run["config"]["corpus"]["sources"][0]["path"] == f"dataset://wiki@sha256:{dataset['hash']}"

    scene = Scene(here.database, tmp_path, here.settings, here.jobs, here.pools, now=time.time())
    scene.round()
    given = here.jobs.submissions[scene.job(run["id"])]
    config = check_config(json.loads(given.config_path.read_text()))
    assert config.corpus.sources[0].path == copy
    with reading_within(given.read_roots):
        identity = input_identity(config)["corpus"]
    with (
        reading_within(here.settings.roots.readable()),
        pytest.raises(CorpusError, match="folder of the service's runs"),
    ):
        input_identity(config)
    other = here.upload("other", files, "bob")
    assert input_identity(config)["corpus"] == identity  # not copied again
    here.bring(run["id"], RunState.CANCELLED)
    assert here.ann.delete(f"/v1/runs/{run['id']}").status_code == 204
    assert here.ann.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
    assert len(remote.list()) == 3
    assert here.bob.delete(f"/v1/datasets/{other['id']}").status_code == 204
    assert remote.list() == {}
