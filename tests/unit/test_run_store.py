"""The store of a run at a URI: what is committed is complete, and every machine sees the same."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import Machine
from s3_standin import s3_server

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.errors import ConfigError, RunDirError, StorageError
from moedisco_ray.core.records.run_damage import damage_of
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store import cache
from moedisco_ray.core.store.artifacts import commit, is_done, read_manifest
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.core.store.live_files import LiveFiles
from moedisco_ray.core.store.locations import CACHE, joined
from moedisco_ray.core.store.remote import Remote
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_takeover import begin, collect
from moedisco_ray.core.store.run_work import Files, on_files
from moedisco_ray.training import TrainJob

FILES = st.dictionaries(st.sampled_from(["a", "b/c", "b/d", "e/f/g"]), st.binary(max_size=64), min_size=1)
NEVER_SEEN = "half"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("runs") as server:
        yield f"s3://runs?endpoint_override={server}&scheme=http"


@pytest.fixture(params=["disk", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> str:
    return f"file://{tmp_path}/bucket/run" if request.param == "disk" else str(joined(bucket, tmp_path.name, "run"))


@pytest.fixture
def machines(tmp_path: Path, uri: str) -> list[Machine]:
    return [Machine(tmp_path / name, uri) for name in ("driver", "worker", "reader")]


def write(directory: Path, files: dict[str, bytes]) -> list[Path]:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return [directory / name for name in files]


def content(directory: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    return {name: data for name, data in found.items() if name != "manifest.json"}


def read(machine: Machine, name: str) -> dict[str, bytes]:
    store = machine.store
    store.fetch(store.directory / name)
    return content(store.directory / name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ours=FILES, theirs=FILES, before=FILES)
def test_an_artifact_holds_what_all_machines_wrote_and_nothing_of_the_one_before(
    tmp_path: Path, ours: dict[str, bytes], theirs: dict[str, bytes], before: dict[str, bytes]
) -> None:
    place = tmp_path / uuid.uuid4().hex
    driver, worker, reader = (
        Machine(place / name, f"file://{place}/bucket") for name in ("driver", "worker", "reader")
    )
    store = driver.store
    artifact = store.directory / "corpus"
    with commit(artifact, "1", store) as draft:
        write(draft.path, before)
    assert read(reader, "corpus") == before
    with commit(artifact, "2", store) as draft:
        theirs_at = worker.store.directory / draft.path.relative_to(store.directory)
        worker.store.publish(*write(theirs_at, theirs))
        write(draft.path, ours)
        assert read(reader, "corpus") == before
    assert read(reader, "corpus") == theirs | ours
    assert read(driver, "corpus") == theirs | ours
    assert is_done(read_manifest(artifact), "2", {})
    collect(store)
    shutil.rmtree(reader.folder)
    assert read(reader, "corpus") == theirs | ours
    assert len([name for name in store.remote.list() if name.startswith("objects/")]) == len(theirs | ours)
    assert store.files(artifact) == [artifact / name for name in sorted(theirs | ours) if "/" not in name]


def test_a_failed_attempt_is_never_seen(machines: list[Machine]) -> None:
    driver, worker, reader = machines
    store = driver.store
    with pytest.raises(ValueError, match=NEVER_SEEN), commit(store.directory / "seed", "1", store) as draft:
        worker.store.publish(*write(worker.store.directory / draft.path.relative_to(store.directory), {"a": b"x"}))
        raise ValueError(NEVER_SEEN)
    assert not store.has(store.directory / "seed")
    assert read(reader, "seed") == {}
    collect(store)
    assert not store.remote.list()


def test_files_are_fetched_one_by_one_checked_and_repaired(machines: list[Machine]) -> None:
    driver, _, reader = machines
    store = driver.store
    with commit(store.directory / "corpus", "1", store) as draft:
        write(draft.path, {"train/0": b"zero", "train/1": b"one", "index": b"i"})
    other = reader.store
    other.fetch(other.directory / "corpus" / "train" / "1")
    assert content(other.directory / "corpus") == {"train/1": b"one"}
    (other.directory / "corpus" / "train" / "1").write_bytes(b"torn at its end")
    other.fetch(other.directory / "corpus" / "train")
    assert content(other.directory / "corpus") == {"train/0": b"zero", "train/1": b"one"}
    assert other.read("corpus/index") == b"i"
    assert other.read("corpus/none") is None
    damaged = next(name for name in store.remote.list("objects") if name.endswith("/index"))
    store.remote.write(damaged, b"j")
    with pytest.raises(StorageError, match=r"is damaged: .* with --repair"):
        other.fetch(other.directory / "corpus" / "index")
    assert not (other.directory / "corpus" / "index").exists()


def test_a_directory_is_linked_by_its_objects_and_outlives_its_source(machines: list[Machine]) -> None:
    driver, worker, reader = machines
    trained = worker.store.directory / "checkpoints" / "submodels-1" / "0" / "trained"
    worker.store.publish(*write(trained, {"model": b"weights"})[:0], trained)
    store = driver.store
    source = store.directory / trained.relative_to(worker.store.directory)
    assert store.has(source)
    with commit(store.directory / "submodels", "1", store) as draft:
        store.link(source, draft.path / "0")
    with commit(store.directory / "finetuned", "1", store) as draft:
        store.link(store.directory / "submodels" / "0", draft.path)
    store.remove(store.directory / "checkpoints")
    collect(store)
    assert not store.has(source)
    assert read(reader, "submodels") == {"0/model": b"weights"}
    assert read(reader, "finetuned") == {"model": b"weights"}
    assert store.has(store.directory / "submodels" / "0")
    assert not store.has(store.directory / "submodels" / "1")
    assert len(store.remote.list("objects")) == 1


def test_an_artifact_that_is_linked_whole_has_the_files_of_its_source_alone(machines: list[Machine]) -> None:
    """A run without a fine-tune links its merged model; a local run's commit notes became a file of the artifact."""
    driver, _, reader = machines
    store = driver.store
    with commit(store.directory / "merged", "1", store) as draft:
        write(draft.path, {"model": b"weights"})
    with commit(store.directory / "finetuned", "1", store) as draft:
        store.link(store.directory / "merged", draft.path)
    assert read(reader, "finetuned") == {"model": b"weights"}


def test_a_damaged_working_copy_is_downloaded_again(machines: list[Machine]) -> None:
    """Before (af276e38): the worker read b"wards", from the damaged file of the right size."""
    driver, worker, _ = machines
    store = driver.store
    with commit(store.directory / "corpus", "1", store) as draft:
        write(draft.path, {"text": b"words"})
    assert read(worker, "corpus") == {"text": b"words"}
    (worker.store.directory / "corpus" / "text").write_bytes(b"wards")
    assert read(worker, "corpus") == {"text": b"words"}


def test_damage_at_a_uri_is_found_and_named(machines: list[Machine]) -> None:
    store = machines[0].store
    write(store.directory, {"run.json": json.dumps(with_checksum({"id": "1"})).encode()})
    store.publish(store.directory / "run.json")
    for stage in STAGES[:2]:
        with commit(store.directory / stage.directory, "1", store) as draft:
            write(draft.path, {"text": b"words", "more/text": b"words"})
    assert list(map(str, damage_of(store.location))) == ["run: ok", "corpus: ok", "seed: ok"]
    [damaged] = (
        name
        for name in store.remote.list("objects/")
        if name.startswith("objects/seed-") and name.endswith("more/text")
    )
    store.remote.write(damaged, b"wards")
    store.remote.write("run.json", b"{}")
    assert list(map(str, damage_of(store.location))) == [
        "run: damaged: run.json",
        "corpus: ok",
        "seed: damaged: more/text",
    ]


def test_work_is_sent_with_its_paths_and_runs_on_another_machine(machines: list[Machine]) -> None:
    driver, worker, reader = machines
    store = driver.store
    with commit(store.directory / "corpus", "1", store) as draft:
        write(draft.path, {"text": b"words"})
    with commit(store.directory / "model", "1", store) as draft:
        call = on_files(
            store, Files([store.directory / "corpus"], [draft.path]), copy, store.directory / "corpus", draft.path
        )
        sent = worker.load(store.dumps(call))
        assert callable(sent)
        assert sent.__name__ == "copy"
        assert sent() == worker.store.directory / "corpus"
    assert read(reader, "model") == {"copied": b"words"}


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    (target / "copied").write_bytes((source / "text").read_bytes())
    return source


def test_one_file_of_an_artifact_is_replaced_and_the_others_stay(machines: list[Machine]) -> None:
    driver, _, reader = machines
    store = driver.store
    with commit(store.directory / "model", "1", store) as draft:
        write(draft.path, {"README.md": b"old", "weights": b"w"})
    (store.directory / "model" / "README.md").write_bytes(b"new")
    store.amend(store.directory / "model" / "README.md")
    assert read(reader, "model") == {"README.md": b"new", "weights": b"w"}
    assert is_done(read_manifest(store.directory / "model"), "1", {})


def test_another_machine_begins_with_the_state_at_the_uri(machines: list[Machine]) -> None:
    driver, worker, _ = machines
    store, other = driver.store, worker.store
    store.publish(*write(store.directory, {"config.json": b"{}", "checkpoints/s-1/ray/progress.json": b"1"}))
    with commit(store.directory / "corpus", "1", store) as draft:
        write(draft.path, {"text": b"words"})
    write(other.directory, {"corpus/manifest.json": b"{}", "events.jsonl": b"stale", "seed/manifest.json": b"{}"})
    begin(other, ["corpus", "seed"], fresh=True)
    assert is_done(read_manifest(other.directory / "corpus"), "1", {})
    assert not (other.directory / "seed").exists()
    assert {path.name for path in other.directory.rglob("*.json*")} == {"config.json", "progress.json", "manifest.json"}
    write(other.directory, {"events.jsonl": b"ours"})
    begin(other, ["corpus", "seed"], fresh=False)
    assert (other.directory / "events.jsonl").read_bytes() == b"ours"


def test_a_place_with_something_else_is_refused(machines: list[Machine]) -> None:
    store = machines[0].store
    store.remote.write("photo.jpg", b"")
    with pytest.raises(RunDirError, match="holds no run"):
        begin(store, [], fresh=True)


def test_a_bucket_that_is_missing_is_one_line_with_its_remedy(bucket: str) -> None:
    store = RunStore.of(bucket.replace("//runs", "//missing/run"))
    with pytest.raises(ConfigError, match=r"output: .*cannot be used"):
        store.remote.write("config.json", b"{}")


def test_files_that_grow_are_uploaded_at_the_end_at_the_latest(machines: list[Machine]) -> None:
    store = machines[0].store
    store.directory.mkdir(parents=True)
    with LiveFiles(store, ("events.jsonl", "ray.log")):
        (store.directory / "events.jsonl").write_text("one\n")
    assert store.read("events.jsonl") == b"one\n"
    assert store.read("ray.log") is None


def test_a_job_of_a_run_at_a_path_is_sent_as_it_is(tmp_path: Path) -> None:
    store = RunStore.of(tmp_path)
    sent = TrainJob(
        stage="seed",
        name="seed",
        model=tmp_path / "model",
        packed_dirs=(tmp_path,),
        output=tmp_path / "trained",
        checkpoints=tmp_path / "steps",
        steps=3,
        sequence_length=8,
        optimizer=Optimizer(),
        checkpoint_every=None,
        store=store,
    )
    arrived = pickle.loads(pickle.dumps(sent))
    assert arrived == sent
    assert arrived.store == store


def test_what_was_not_used_for_longest_is_dropped_and_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RECENT_SECONDS", 0.0)
    monkeypatch.setenv(CACHE, str(tmp_path / "driver"))
    monkeypatch.setenv(cache.LIMIT, "0.0004")  # 400 kB
    store = RunStore.of(f"file://{tmp_path}/bucket/run")
    for name in ("old", "used", "pinned"):
        with commit(store.directory / name, "1", store) as draft:
            write(draft.path, {"data": bytes(100_000)})
    names = [store.directory / name for name in ("old", "used", "pinned")]
    store.fetch(*names)
    for age, path in enumerate(names):
        moment = time.time() - 1000 + age
        os.utime(store.home / "used" / path.name, (moment, moment))
    with commit(store.directory / "new", "1", store) as draft:
        write(draft.path, {"data": bytes(150_000)})
        unsent = write(store.directory / "objects" / "next-1", {"unsent": bytes(1000)})
        with store.using(names[2]):
            os.utime(store.home / "used" / "pinned", (1, 1))
            cache.make_room(store.home.parent)
    assert [(path / "data").exists() for path in (*names, store.directory / "new")] == [False, True, True, True]
    assert unsent[0].exists()
    assert is_done(read_manifest(names[0]), "1", {})
    monkeypatch.setenv(cache.LIMIT, "1")
    store.fetch(names[0])
    assert (names[0] / "data").stat().st_size == 100_000


def test_files_of_a_draft_are_dropped_once_they_are_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RECENT_SECONDS", 0.0)
    monkeypatch.setenv(CACHE, str(tmp_path / "worker"))
    monkeypatch.setenv(cache.LIMIT, "0")
    store = RunStore.of(f"file://{tmp_path}/bucket/run")
    sent, unsent = write(store.directory / "objects" / "corpus-1", {"sent": b"1", "unsent": b"2"})
    store.publish(sent)
    cache.make_room(store.home.parent)
    assert not sent.exists()
    assert unsent.exists()
    monkeypatch.setenv(cache.LIMIT, "1")
    store.fetch(sent)
    assert sent.read_bytes() == b"1"


@pytest.mark.parametrize(
    "words",
    [
        "AWS Error ACCESS_DENIED during PutObject operation",
        "google::cloud::Status(PERMISSION_DENIED: Permanent error)",
        "Azure Error: [AuthorizationPermissionMismatch] 403",
        "Azure Error: [ContainerNotFound] 404",
    ],
)
def test_an_error_that_no_retry_cures_is_not_retried(tmp_path: Path, words: str) -> None:
    remote = Remote(f"file://{tmp_path}", "output", (3600.0,))
    remote.on_disk = False

    def fails() -> None:
        raise OSError(words)

    with pytest.raises(ConfigError, match="name a location that you may write to"):
        remote.retrying(fails)
