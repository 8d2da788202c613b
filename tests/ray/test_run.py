from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from second_node import second_node
from small_run import begin_at, small_config
from waiting import until

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import HighMemoryPool, RunConfig
from moedisco_ray.core.errors import RunDirError, UserError
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray.backend import train_gang
from moedisco_ray.training import TrainJob

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

LOCAL = LocalBackend()
TOKENS = 150_000


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


def test_the_model_has_learnt(on_ray: Path) -> None:
    stages = read_json(on_ray / "evaluation" / "evaluation.json")["stages"]
    # 112.0 was measured; 264.7 is that of the tokens' frequencies, and 600 that of a uniform guess
    assert stages["finetune"]["perplexity"] < 120
    assert stages["finetune"]["perplexity"] < stages["merge"]["perplexity"]


def test_ray_and_one_plain_process_make_the_same_bits(on_ray: Path, plain: Path) -> None:
    models = [f"{part}/model.safetensors" for part in ("submodels/0", "submodels/1", "merged", "finetuned", "model")]
    for name in ("clusters/report.json", *models):
        assert (on_ray / name).read_bytes() == (plain / name).read_bytes(), name


def test_a_fresh_process_with_only_transformers_loads_it_and_writes_text(on_ray: Path) -> None:
    script = """
import sys, json
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=24, do_sample=False)
assert not [name for name in sys.modules if name.startswith(("moedisco", "ray"))]
print(json.dumps(tokenizer.decode(tokens[0])))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(on_ray / "model")], capture_output=True, text=True, check=True
    )
    text = json.loads(done.stdout.splitlines()[-1])
    assert text.startswith("def ")
    assert len(text) > 12
    assert all(character.isprintable() or character.isspace() for character in text)


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


@pytest.mark.slow
def test_a_gang_of_two_trains_the_model_of_one(ray_cluster: None, undisturbed: Path, tmp_path: Path) -> None:
    config = small_config(undisturbed.parent)

    def job(name: str) -> TrainJob:
        return TrainJob(
            stage="finetune",
            name=name,
            model=undisturbed / "merged",
            packed_dirs=(undisturbed / "corpus" / "shards",),
            output=tmp_path / name,
            checkpoints=tmp_path / f"{name}-steps",
            steps=12,
            sequence_length=64,
            optimizer=config.finetune.optimizer,
            checkpoint_every=5,
            load_balance=0.01,
            z_loss=0.001,
        )

    events: list[Event] = []
    gang = train_gang(job("gang"), HighMemoryPool(workers=2), 0, tmp_path / "ray", events.append)
    [alone] = LOCAL.train_all([job("alone")], Placement(config.pools.high_memory, 1, 0), tmp_path, events.append)
    assert [event.data["workers"] for event in events if event.type == "unit_started"] == [2]
    assert gang.worker_seconds == pytest.approx(2 * gang.seconds)
    assert gang.result.losses == pytest.approx(alone.result.losses, rel=1e-4)
