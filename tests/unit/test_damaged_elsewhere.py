"""Damage outside finished stages: in data owners' storages, and in outputs of trainings of an unfinished stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_runs import FOLDERS, Finished, flip_bit, results, shared_run
from owned_text import OWNERS, owned_config
from pinned_runs import config_of
from small_run import begin_at
from test_damaged_runs import change_digit, invoke

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import DamagedError, RunStopped
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Results are the same bits with the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def owned() -> Iterator[Finished]:
    with shared_run(owned_config) as found:
        yield found


def test_a_restored_run_has_its_owners_storages_back_too(tmp_path: Path) -> None:
    """Else the damage of one test is there in the next one, as they share the run."""
    config = owned_config(tmp_path)
    files = [config.directory / "file", *(tmp_path / name / "file" for name in OWNERS)]
    for path in files:
        path.parent.mkdir(parents=True)
        path.write_text("intact")
    made = Finished.of(config, tmp_path / "kept")
    for path in files:
        flip_bit(path)
        path.with_name("more").touch()
    made.restore()
    assert [path.read_text() for path in files] == ["intact"] * 3
    assert not list(tmp_path.glob("**/more"))


def shards_of(config: RunConfig, owner: str) -> list[Path]:
    [corpus] = Path(config.pools.owners[owner].storage).glob("*/corpus")
    return sorted((corpus / "shards").glob("*.npy"))


def again(config: RunConfig, **options: Any) -> list[Event]:
    """Continue a run; return its events."""
    events: list[Event] = []
    pipeline.run(config, (events.append,), backend=LocalBackend(), **options)
    return events


def started(events: list[Event]) -> list[str]:
    return [str(event.stage) for event in events if event.type == "stage_started"]


@pytest.mark.slow
def test_damage_in_an_owners_storage_is_named_and_repaired(owned: Finished) -> None:
    """With its stage and owner. The repaired corpus is the same, so the models that were made from it stay.

    Before (af276e38): the training ended with "IndexError: Target 2318 is out of bounds", which names no file.
    """
    owned.restore()
    shards = shards_of(owned.config, "alice")
    intact = shards[0].read_bytes()
    for folder in FOLDERS[FOLDERS.index("submodels") :]:
        shutil.rmtree(owned.directory / folder)
    flip_bit(shards[0])
    with pytest.raises(
        DamagedError, match=rf"corpus/shards/{shards[0].name} in .*alice.* is damaged: .* stage corpus wrote"
    ):
        again(owned.config)
    code, output = invoke("verify", owned.directory)
    assert code == 1
    assert f"corpus of owner alice: damaged: shards/{shards[0].name} corpus of owner bob: ok" in output
    events = again(owned.config, repairs=True)
    assert started(events) == ["corpus", *("submodels", "merge", "finetune", "evaluate", "export")]
    assert (
        f"damaged: shards/{shards[0].name} of stage corpus, in the storage of data owner alice; the stage is made again"
        in [event.data["message"] for event in events if event.type == "warning"]
    )
    assert shards[0].read_bytes() == intact
    assert results(owned.directory) == results(owned.copy)
    assert started(again(owned.config, repairs=True)) == []


@pytest.mark.slow
def test_a_finished_run_repairs_an_owners_corpus_too(owned: Finished) -> None:
    owned.restore()
    flip_bit(shards_of(owned.config, "bob")[0])
    assert started(again(owned.config, repairs=True)) == ["corpus"]
    assert invoke("verify", owned.directory)[0] == 0


def test_verify_says_which_storage_it_cannot_read(owned: Finished) -> None:
    owned.restore()
    storages = [Path(owner.storage) for owner in owned.config.pools.owners.values()]
    for storage in storages:
        storage.rename(storage.with_suffix(".away"))
    try:
        code, output = invoke("verify", owned.directory)
    finally:
        for storage in storages:
            storage.with_suffix(".away").rename(storage)
    assert code == 0
    assert all(f"corpus of owner {name}: not verified: the storage cannot be read here" in output for name in OWNERS)


def half_trained(config: RunConfig, home: Path, done: Path | None = None) -> Path:
    """Train until the first sub-model is finished and the second is not; return the folder of the first.

    A finished run of the same text gives what comes before.
    """
    if done is not None:
        begin_at("submodels", config, done)
    stop = StopFile(home / "stop")
    begun: list[str] = []

    def listen(event: Event) -> None:
        if event.type == "progress" and event.stage == "submodels":
            begun.append(str(event.unit))
            if event.unit != begun[0]:
                stop.request("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (listen,), backend=LocalBackend(), stop=stop)
    [record] = RunStore.of(config.location).directory.glob("checkpoints/submodels-*/*/result.json")
    assert record.parent.name == begun[0]
    return record.parent


@pytest.fixture(scope="module")
def without_syncs(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = config_of("qwen3_moe", tmp_path_factory.mktemp("undisturbed"))
    return config.model_copy(update={"submodels": config.submodels.model_copy(update={"sync_every": None})})


@pytest.fixture(scope="module")
def undisturbed(without_syncs: RunConfig) -> Path:
    return pipeline.run(without_syncs, backend=LocalBackend())


@pytest.fixture
def config(without_syncs: RunConfig, tmp_path: Path) -> RunConfig:
    return without_syncs.model_copy(update={"output": tmp_path / "runs"})


@pytest.mark.slow
@pytest.mark.parametrize("file", ["trained/model.safetensors", "result.json"])
def test_the_damaged_output_of_a_finished_training_is_made_again(
    config: RunConfig, undisturbed: Path, tmp_path: Path, file: str
) -> None:
    """The stage is interrupted after one of its trainings; only this one is repeated.

    Before (af276e38): the run made another model, exit 0, with either file.
    """
    folder = half_trained(config, tmp_path, undisturbed)
    if file == "result.json":
        change_digit(folder / file, '"tokens": ')
    else:
        flip_bit(folder / file)
    name = (folder / file).relative_to(config.directory)
    with pytest.raises(DamagedError, match=rf"{name} in .* is damaged: it is not what stage submodels wrote"):
        again(config)
    code, output = invoke("verify", config.directory)
    assert (code, f"submodels of {folder.name}: damaged: {file}" in output) == (1, True), output
    events = again(config, repairs=True)
    assert f"damaged: {file} of {folder.name} of stage submodels; its training is made again" in [
        event.data["message"] for event in events if event.type == "warning"
    ]
    assert results(config.directory) == results(undisturbed)


@pytest.mark.slow
def test_a_damaged_output_that_a_stage_has_just_taken_over_is_made_again(
    config: RunConfig, undisturbed: Path, tmp_path: Path
) -> None:
    """A kill between the commit of a stage and the deletion of its trainings: both have the same files, by links.

    Before (2a4777cc): each repair took the damaged output over again.
    """
    folder = half_trained(config, tmp_path, undisturbed)
    shutil.copytree(folder.parent, tmp_path / "trainings")
    again(config)
    for later in FOLDERS[FOLDERS.index("submodels") + 1 :]:
        shutil.rmtree(config.directory / later)
    shutil.copytree(tmp_path / "trainings", folder.parent)
    number = folder.name.rpartition("-")[2]
    damaged = config.directory / "submodels" / number / "model.safetensors"
    flip_bit(damaged)
    shutil.copy2(damaged, folder / "trained" / "model.safetensors")
    again(config, repairs=True)
    assert results(config.directory) == results(undisturbed)


@pytest.mark.slow
def test_a_damaged_output_at_a_uri_is_made_again(
    config: RunConfig, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before (2a4777cc): `verify` listed nothing; `--repair` kept the object until the next stage found the damage."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    config = config.model_copy(update={"output": f"file://{tmp_path}/uri"})
    folder = half_trained(config, tmp_path)
    at_uri = tmp_path / "uri" / config.name
    manifest = at_uri / folder.relative_to(RunStore.of(config.location).directory) / "trained" / "manifest.json"
    flip_bit(at_uri / json.loads(manifest.read_bytes())["files"]["model.safetensors"][2])
    code, output = invoke("verify", config.location)
    assert (code, f"submodels of {folder.name}: damaged: trained/model.safetensors" in output) == (1, True), output
    again(config, repairs=True)
    monkeypatch.setenv(CACHE, str(tmp_path / "elsewhere"))
    store = RunStore.of(config.location)
    store.fetch(*(store.directory / part for part in ("model", "evaluation")))
    assert results(store.directory) == results(undisturbed)


def test_a_damaged_name_of_the_checkpoints_storage_is_named(tmp_path: Path) -> None:
    """Before (af276e38): "JSONDecodeError: Expecting property name", which names no file, in each later attempt."""
    config = config_of("qwen3_moe", tmp_path)
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"storage": str(tmp_path / "storage")})}
    )
    stop = StopFile(tmp_path / "stop")

    def listen(event: Event) -> None:
        if event.type == "stage_finished":
            stop.request("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (listen,), backend=LocalBackend(), stop=stop)
    named = config.directory / "checkpoints" / "storage.json"
    flip_bit(named)
    with pytest.raises(DamagedError, match=r"checkpoints/storage\.json in .* is damaged"):
        again(config)
    assert "run: damaged: checkpoints/storage.json" in invoke("verify", config.directory)[1]
    stop.path.write_text("cancelled")  # type: ignore[union-attr]
    with pytest.raises(RunStopped):
        again(config, repairs=True, stop=stop)
    assert "damaged: checkpoints/storage.json of the run; it is made again" in [
        event.data.get("message") for event in EventLog.read(config.directory / "events.jsonl")
    ]
