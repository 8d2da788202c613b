from __future__ import annotations

import functools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from second_node import second_node
from small_run import begin_at, small_config
from waiting import until

from moedisco_ray.backend import Placement, of_whole_moe
from moedisco_ray.core.config import HighMemoryPool, RunConfig
from moedisco_ray.core.errors import RunDirError, UserError
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray.backend import train_all, train_gang
from moedisco_ray.training import TrainJob

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

LOCAL = LocalBackend()
TOKENS = 60_000


def short_config(output: Path, **changes: Any) -> RunConfig:
    """The small run with fewer tokens, as no test here waits for a moment in it."""
    return small_config(output, **{"tokens": {"total": TOKENS}, **changes})


@pytest.fixture(scope="module")
def on_ray(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(short_config(tmp_path_factory.mktemp("on_ray")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(short_config(tmp_path_factory.mktemp("plain")), backend=LOCAL)


@pytest.fixture
def finished(plain: Path, tmp_path: Path) -> Path:
    """A copy of the run in one plain process."""
    return Path(shutil.copytree(plain, tmp_path / plain.name))


def test_every_stage_leaves_its_artifact_and_the_report_counts_them(on_ray: Path) -> None:
    assert all(read_manifest(on_ray / stage.directory) for stage in STAGES)
    report = read_json(on_ray / "report.json")
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in STAGES]
    assert report["tokens"] == pytest.approx(TOKENS, rel=0.02)
    assert report["bill"]["dollars"] > 0
    assert {"submodel-0", "submodel-1", "finetune"} == set(report["curves"])
    assert not (on_ray / "checkpoints").exists()


def test_ray_and_one_plain_process_make_the_same_bits(on_ray: Path, plain: Path) -> None:
    models = [f"{part}/model.safetensors" for part in ("submodels/0", "submodels/1", "merged", "finetuned", "model")]
    for name in ("clusters/report.json", *models):
        assert (on_ray / name).read_bytes() == (plain / name).read_bytes(), name


def test_a_second_run_does_nothing_again(finished: Path) -> None:
    before = {stage.name: read_manifest(finished / stage.directory) for stage in STAGES}
    report = (finished / "report.json").read_bytes()
    events: list[Event] = []
    pipeline.run(short_config(finished.parent), (events.append,), backend=LOCAL)
    assert [event.stage for event in events if event.type == "stage_skipped"] == [stage.name for stage in STAGES]
    assert {stage.name: read_manifest(finished / stage.directory) for stage in STAGES} == before
    assert (finished / "report.json").read_bytes() == report


def test_another_runs_directory_is_refused_and_left_alone(finished: Path) -> None:
    before = (finished / "config.json").read_bytes()
    with pytest.raises(RunDirError, match=r"tokens\.total"):
        pipeline.run(short_config(finished.parent, tokens={"total": 500_000}), backend=LOCAL)
    assert (finished / "config.json").read_bytes() == before


def test_redo_makes_again_only_what_a_setting_changes(finished: Path) -> None:
    events: list[Event] = []
    pipeline.run(
        short_config(finished.parent, evaluation={"max_tokens": 5_000}), (events.append,), redo=True, backend=LOCAL
    )
    made = [event.stage for event in events if event.type == "stage_started"]
    assert made == ["evaluate", "export"]


@pytest.mark.slow
def test_a_run_waits_for_a_pool_that_has_no_node_and_says_why_and_goes_on_when_one_comes(
    ray_cluster: None, undisturbed: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    config = small_config(tmp_path, pools={"low_memory": {"resource": "late_gpu", "max_workers": 2}})
    begin_at("submodels", config, undisturbed)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(pipeline.run, config, (events.append,))
        until(lambda: any(event.stage == "submodels" for event in events), 120)
        until(lambda: [event for event in events if event.type == "warning"][1:])
        assert not running.done()
        with second_node("late_gpu"):
            directory = running.result(timeout=200)
    at_start, at_work = [event.data["message"] for event in events if event.type == "warning"]
    assert at_start.startswith(
        "pools.low_memory.resource: the run needs 1 late_gpu, and this Ray cluster has no node with it: it will wait"
    )
    assert at_work == "waits for 1 late_gpu: no node of the Ray cluster offers it now"
    assert (directory / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()


def test_a_failed_stage_leaves_nothing_half_written(ray_cluster: None, tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        clusters={"count": 2, "vectors": "tfidf_svd"},
        corpus={
            "sources": [{"path": str(_text(tmp_path)), "format": "text"}],
            "validation_fraction": 0.3,
            "sequence_length": 64,
        },
    )
    with pytest.raises(UserError):
        pipeline.run(config)
    assert {path.name for path in config.directory.iterdir()} == {"config.json", "events.jsonl", "ray.log", "run.json"}
    assert EventLog.read(config.directory / "events.jsonl")[-1].type == "run_failed"


def _text(directory: Path) -> Path:
    path = directory / "one.txt"
    path.write_text("a single short document", encoding="utf-8")
    return path


def job_in(tmp_path: Path, run: Path, name: str, **changes: Any) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name=name,
        model=run / "merged",
        packed_dirs=(run / "corpus" / "shards",),
        output=tmp_path / name,
        checkpoints=tmp_path / f"{name}-steps",
        steps=12,
        sequence_length=64,
        optimizer=short_config(run.parent).finetune.optimizer,
        checkpoint_every=5,
        load_balance=0.01,
        z_loss=0.001,
        **changes,
    )


@pytest.mark.slow
def test_a_training_that_streams_holds_all_slots_of_a_machine(ray_cluster: None, plain: Path, tmp_path: Path) -> None:
    """Its cards divide the layers; here they are threads."""
    pool = of_whole_moe(HighMemoryPool(workers=2, gpus_per_node=2, memory="streamed"))
    box, here, alone = (job_in(tmp_path, plain, name, memory="streamed") for name in ("box", "here", "alone"))
    events: list[Event] = []
    [trained] = train_all([box], Placement(pool, 1, 0), tmp_path / "ray", events.append)
    assert [event.data["workers"] for event in events if event.type in ("workers_held", "unit_started")] == [2, 2]
    assert trained.worker_seconds == pytest.approx(2 * trained.seconds)
    local = LOCAL.train_gang(here, pool, 0, tmp_path, events.append)
    assert local.result.losses == trained.result.losses
    assert local.worker_seconds == pytest.approx(2 * local.seconds)
    one = LOCAL.train_gang(alone, HighMemoryPool(memory="streamed"), 0, tmp_path, events.append)
    assert trained.result.losses == pytest.approx(one.result.losses, rel=1e-5)


@pytest.mark.slow
def test_a_gang_of_two_trains_the_model_of_one(ray_cluster: None, undisturbed: Path, tmp_path: Path) -> None:
    config = small_config(undisturbed.parent)
    events: list[Event] = []
    job = functools.partial(job_in, tmp_path, undisturbed)
    gang = train_gang(job("gang"), HighMemoryPool(workers=2), 0, tmp_path / "ray", events.append)
    [alone] = LOCAL.train_all([job("alone")], Placement(config.pools.high_memory, 1, 0), tmp_path, events.append)
    assert [event.data["workers"] for event in events if event.type == "unit_started"] == [2]
    assert gang.worker_seconds == pytest.approx(2 * gang.seconds)
    assert gang.result.losses == pytest.approx(alone.result.losses, rel=1e-4)
