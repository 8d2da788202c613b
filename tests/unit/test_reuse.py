"""A run that takes finished stages from another one ends with the same bits as a run that makes all of them."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_standin import s3_server
from small_run import OneCorpus, small_config

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError, DamagedError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_damage import damage_of
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline

TOKENS = {"total": 16_000, "finetune_share": 0.4}
FIRST = ["corpus", "seed", "cluster", "decompose", "submodels", "merge"]
LAST = ["finetune", "evaluate", "export"]


def config_at(output: Path, name: str, lr: float, **changes: object) -> RunConfig:
    rate = {"optimizer": {"batch_tokens": 1024, "lr": lr}}
    return small_config(output, name=name, tokens=TOKENS, finetune=rate, **changes)


def made(config: RunConfig, *others: Path | str, lenient: bool = False) -> tuple[Path, list[Event]]:
    events: list[Event] = []
    directory = pipeline.run(config, (events.append,), backend=OneCorpus(), reuses=others, lenient=lenient)
    return directory, events


@functools.cache
def _base() -> tempfile.TemporaryDirectory[str]:
    home = tempfile.TemporaryDirectory()
    for name, lr in (("base", 1e-3), ("full", 2e-3)):
        made(config_at(Path(home.name), name, lr))
    return home


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder with the run `base`, and with `full`: the same at another rate of the fine-tune, made whole."""
    shutil.copytree(_base().name, tmp_path / "runs")
    return tmp_path / "runs"


def taken(events: list[Event]) -> list[str]:
    return [
        str(event.stage)
        for event in events
        if event.type == "stage_skipped" and event.data == {"run": "base", "offer": 0}
    ]


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same artifacts, bit for bit; the model's card names the run."""
    for stage in ("corpus", "clusters", "submodels", "merged", "finetuned"):
        first, second = read_manifest(one / stage), read_manifest(other / stage)
        assert first is not None
        assert second is not None
        if first.fingerprint != second.fingerprint or first.content != second.content:
            return False
    return (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()


def test_a_changed_last_stage_is_made_alone_with_the_bits_of_a_full_run(runs: Path) -> None:
    directory, events = made(config_at(runs, "again", 2e-3), runs / "base")
    assert taken(events) == FIRST
    assert [event.stage for event in events if event.type == "stage_started"] == LAST
    assert same(directory, runs / "full")
    assert not same(directory, runs / "base")
    bill, full = (read_json(each / "report.json")["bill"] for each in (directory, runs / "full"))
    assert {line["stage"] for line in bill["lines"]} == set(LAST)
    # Not less than the full run's dollars: seconds of small runs differ by more than what is saved.
    assert bill["dollars"] == pytest.approx(sum(line["dollars"] for line in bill["lines"]))
    assert sum(line["dollars"] for line in full["lines"] if line["stage"] in FIRST) > 0
    assert bill["verdict"] is None
    # What the other run holds is not stored again, and stays when that run is deleted.
    weights = "submodels/0/model.safetensors"
    assert (directory / weights).stat().st_ino == (runs / "base" / weights).stat().st_ino
    shutil.rmtree(runs / "base")
    assert pipeline.is_finished(config_at(runs, "again", 2e-3))
    assert same(made(config_at(runs, "again", 2e-3))[0], runs / "full")


@pytest.mark.slow
def test_nothing_is_taken_that_the_settings_change(runs: Path) -> None:
    other = config_at(runs, "other", 1e-3, corpus={"sequence_length": 32})
    assert taken(made(other, runs / "base")[1]) == []


def test_a_run_takes_from_several_and_goes_on_where_it_was_interrupted(runs: Path) -> None:
    """The first run that has a stage gives it; stages that a run has already are its own."""
    shutil.rmtree(runs / "base" / "submodels")
    directory, events = made(config_at(runs, "again", 2e-3), runs / "base", runs / "full")
    given = {str(event.stage): event.data["run"] for event in events if event.type == "stage_skipped"}
    assert [stage for stage, run in given.items() if run == "full"] == ["submodels", *LAST]
    assert not [part.folder for part in damage_of(runs / "full") if part.damaged]
    cards = [(each / "model" / "README.md").read_text() for each in (runs / "full", directory)]
    assert ["# full" in cards[0], "# again" in cards[1]] == [True, True]  # a file that is written again is no link
    assert {given[stage] for stage in ("corpus", "seed", "cluster", "decompose", "merge")} == {"base"}
    assert not [event for event in made(config_at(runs, "again", 2e-3), runs / "base")[1] if event.data.get("run")]
    assert same(directory, runs / "full")


def test_a_damaged_file_of_the_other_run_is_never_taken(runs: Path) -> None:
    weights = runs / "base" / "submodels" / "0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match="submodels"):
        made(config_at(runs, "again", 2e-3), runs / "base")


def test_a_place_without_a_run_is_refused(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"--reuse: '.*nothing': holds no run; name the directory or URI of a run"):
        made(config_at(runs, "again", 2e-3), runs / "nothing")
    assert not (runs / "again").exists()


@pytest.mark.slow
def test_a_service_offers_runs_of_which_parts_are_gone(runs: Path) -> None:
    """A half-deleted stage is made again, with a warning, and leaves nothing behind; so is what only a lost run had."""
    (runs / "base" / "submodels" / "1" / "model.safetensors").unlink()
    directory, events = made(config_at(runs, "again", 2e-3), runs / "gone", runs / "base", lenient=True)
    given = [str(event.stage) for event in events if event.data.get("offer") == 1]
    assert given == ["corpus", "seed", "cluster", "decompose"]
    warnings = [event.data["message"] for event in events if event.type == "warning"]
    assert [each.partition(" of ")[0] for each in warnings if "to reuse" in each] == ["1", "stage submodels"]
    assert "submodels" in [event.stage for event in events if event.type == "stage_started"]
    assert not list(directory.glob(".*draft*"))
    assert same(directory, runs / "full")


def test_a_run_that_is_deleted_while_it_is_read_is_passed_over(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def deleting(source: Path, target: Path) -> None:
        if Path(source).name == "model.safetensors":
            shutil.rmtree(runs / "base", ignore_errors=True)
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", deleting)
        directory, events = made(config_at(runs, "again", 2e-3), runs / "base", lenient=True)
    assert taken(events) == ["corpus"]
    assert same(directory, runs / "full")


@pytest.mark.slow
def test_runs_at_uris_give_and_take(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path / "cache"))
    with s3_server("runs") as server:
        place = f"s3://runs/team?endpoint_override={server}&scheme=http"
        there = config_at(runs, "there", 2e-3).model_copy(update={"output": place})
        directory, events = made(there, runs / "base")
        assert taken(events) == FIRST
        assert same(directory, runs / "full")
        uri = str(there.location)
        shutil.rmtree(tmp_path / "cache")
        back, events = made(config_at(runs, "back", 2e-3), uri)
        assert next(event.data for event in events if event.type == "stage_skipped") == {"run": "there", "offer": 0}
        assert same(back, runs / "full")
