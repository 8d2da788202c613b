"""Runs that are not finished can be looked at, and a run that failed at once does not keep its directory."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from small_run import OneCorpus, small_config
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunDirError, RunStopped, UserError
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.run_report import current_report, run_state
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.plan.resolve import ResolvedRun

FEW = {
    "tokens": {"total": 24_000, "seed_share": 0.25, "finetune_share": 0.25},
    "clusters": {"count": 2, "vectors": "hidden_state"},
    "evaluation": {"max_tokens": 3000},
    "merge": {"calibration_tokens": 1024},
}


def show(directory: Path, command: str = "show") -> str:
    result = CliRunner().invoke(app, [command, str(directory)])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.fixture
def stopped(tmp_path: Path) -> RunConfig:
    """A run that was asked to stop once its clusters were made."""
    config, stop = small_config(tmp_path / "runs", **FEW), tmp_path / "stop"

    def ask(event: Event) -> None:
        if event.type == "stage_finished" and event.stage == "cluster":
            stop.write_text("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (ask,), backend=OneCorpus(), stop=StopFile(stop))
    return config


def test_a_stopped_run_is_shown_and_drawn_as_far_as_it_is(stopped: RunConfig) -> None:
    text = show(stopped.directory)
    assert (
        "stopped (cancelled): figures of the stages so far; `moedisco run` with the same configuration continues it"
        in text
    )
    assert "seed" in text
    assert "Clusters" in text
    drawn = show(stopped.directory, "plot")
    assert "loss.png" in drawn
    assert "clusters.png" in drawn
    raw = json.loads(CliRunner().invoke(app, ["show", str(stopped.directory), "--json"]).stdout)
    assert (raw["state"], raw["state_reason"]) == ("stopped", "cancelled")
    assert [stage["name"] for stage in raw["stages"]] == ["corpus", "seed", "cluster"]


def test_a_running_run_is_shown_as_running(stopped: RunConfig) -> None:
    with (stopped.directory / "events.jsonl").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "running: figures of the stages so far" in show(stopped.directory)
    assert "stopped" in show(stopped.directory)


@pytest.mark.parametrize(
    ("events", "state", "reason"),
    [
        ([], "interrupted", None),
        ([Event("run_started")], "interrupted", None),
        ([Event("run_started"), Event("run_failed", data={"message": "no text"})], "failed", "no text"),
        (
            [
                Event("run_started"),
                Event("run_stopped", data={"reason": "x"}),
                Event("run_started"),
                Event("run_finished"),
            ],
            "finished",
            None,
        ),
        ([Event("run_started"), Event("run_finished"), Event("run_started"), Event("warning")], "interrupted", None),
    ],
)
def test_the_state_is_that_of_the_last_attempt(
    tmp_path: Path, events: list[Event], state: str, reason: str | None
) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for event in events:
        log(event)
    log.close()
    assert run_state(RunStore.of(tmp_path), events) == (state, reason)


def test_a_run_of_another_version_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": "x", "sectors": 1}')
    with pytest.raises(RunDirError, match="holds a run of another version"):
        current_report(tmp_path)


def test_a_run_with_nothing_made_yet_has_nothing_to_draw(tmp_path: Path) -> None:
    config = small_config(tmp_path, **FEW)
    pipeline.claim(config, redo=False)
    assert "nothing to draw yet" in show(config.directory, "plot")
    assert "interrupted" in show(config.directory)


@pytest.mark.slow
def test_a_run_that_failed_at_once_gives_its_directory_to_the_mended_one(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    failing: dict[str, Any] = {**FEW, "corpus": {"sources": [{"path": str(empty)}]}}
    with pytest.raises(UserError):
        pipeline.run(small_config(tmp_path / "runs", **failing), backend=OneCorpus())
    mended = small_config(tmp_path / "runs", **FEW)
    pipeline.run(mended, backend=OneCorpus())
    assert current_report(mended.directory).state == "finished"
    # What is made is kept: other settings need another name, or --redo.
    with pytest.raises(RunDirError, match="holds a run with other settings"):
        pipeline.claim(mended.model_copy(update={"seed": 1}), redo=False)


def test_a_trainers_checkpoint_is_work_that_is_kept(tmp_path: Path) -> None:
    config = small_config(tmp_path, **FEW)
    pipeline.claim(config, redo=False)
    pipeline.claim(config.model_copy(update={"seed": 1}), redo=False)
    (config.directory / "checkpoints" / "seed-x").mkdir(parents=True)
    with pytest.raises(RunDirError, match="holds a run with other settings"):
        pipeline.claim(config, redo=False)


def test_a_second_process_changes_nothing_of_a_run_that_another_works_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, **FEW)
    pipeline.claim(config, redo=False)
    before = (config.directory / "config.json").read_bytes()
    with (config.directory / "events.jsonl").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunDirError, match="another process works on this run"):
            pipeline.run(config.model_copy(update={"seed": 1}), backend=OneCorpus())
    assert (config.directory / "config.json").read_bytes() == before


def test_every_attempt_begins_with_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event before it would count the time since an attempt that was killed as held."""
    monkeypatch.setattr(ResolvedRun, "remarks", lambda _: iter(["the run uses other settings"]))
    config, seen = small_config(tmp_path, **FEW), list[Event]()

    def stop(event: Event) -> None:
        seen.append(event)
        if event.type == "stage_started":
            raise RunStopped("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (stop,), backend=OneCorpus())
    assert [event.type for event in seen[:2]] == ["run_started", "warning"]
