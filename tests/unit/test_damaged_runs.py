"""What a damaged run says, and how it is repaired."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from changed_files import accept_changes
from damaged_runs import Finished, flip_bit, lose_page, pinned_run, results
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.errors import MoeDiscoError, RunStopped
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture(scope="module")
def made() -> Iterator[Finished]:
    with pinned_run() as found:
        yield found


@pytest.fixture
def finished(made: Finished) -> Finished:
    made.restore()
    return made


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, " ".join(result.output.split())


def run(finished: Finished, **options: Any) -> list[str]:
    """Continue the run; return the stages that it made."""
    before = len(EventLog.read(finished.directory / "events.jsonl"))
    pipeline.run(finished.config, backend=LocalBackend(), **options)
    events = EventLog.read(finished.directory / "events.jsonl")[before:]
    return [str(event.stage) for event in events if event.type == "stage_started"]


def change_digit(path: Path, before: str) -> None:
    """Change the first digit after a text."""
    content = path.read_text()
    place = next(i for i in range(content.index(before) + len(before), len(content)) if content[i].isdigit())
    path.write_text(f"{content[:place]}{9 - int(content[place])}{content[place + 1 :]}")


def test_a_changed_digit_of_a_report_is_not_shown_and_run_writes_it_again(finished: Finished) -> None:
    """Before (af276e38): `show` printed the changed figures, exit 0."""
    figures = json.loads((finished.directory / "report.json").read_text())["evaluation"]
    change_digit(finished.directory / "report.json", '"perplexity": ')
    code, output = invoke("show", finished.directory)
    assert (code, "report.json in" in output, "run the same command again" in output) == (1, True, True), output
    assert run(finished) == []
    assert invoke("show", finished.directory)[0] == 0
    assert json.loads((finished.directory / "report.json").read_text())["evaluation"] == figures


@pytest.mark.parametrize("harm", [flip_bit, lose_page])
def test_no_command_uses_a_damaged_model(finished: Finished, harm: Callable[[Path], None], tmp_path: Path) -> None:
    """Every command that reads the weights of a finished run.

    Before (af276e38): `evaluate` printed other figures and `experts` wrote the damaged weights, exit 0.
    """
    model, text = finished.directory / "model", finished.config.corpus.sources[0].path
    harm(model / "model.safetensors")
    for command in (
        ("evaluate", model, "--sources", text),
        ("push", finished.directory, "a/b"),
        ("chat", finished.directory),
        ("experts", finished.directory, "0-2", "--output", tmp_path / "chosen"),
    ):
        code, output = invoke(*command)
        assert (code, "model/model.safetensors in" in output, "is damaged" in output) == (1, True, True), output


def test_an_exported_copy_is_verified_where_it_is_used(finished: Finished, tmp_path: Path) -> None:
    """Before (af276e38): `evaluate` printed other figures of the damaged copy, exit 0."""
    assert invoke("export", finished.directory, "--output", tmp_path / "copy")[0] == 0
    text = finished.config.corpus.sources[0].path
    assert invoke("evaluate", tmp_path / "copy", "--sources", text)[0] == 0
    with (tmp_path / "copy" / "README.md").open("a") as card:
        card.write("Edited before it is published.")
    assert invoke("evaluate", tmp_path / "copy", "--sources", text)[0] == 0
    lose_page(tmp_path / "copy" / "model.safetensors")
    code, output = invoke("evaluate", tmp_path / "copy", "--sources", text)
    assert (code, "copy/model.safetensors" in output, "export it again" in output) == (1, True, True), output
    assert "if you changed it yourself, remove its manifest.json" in output
    assert invoke("verify", tmp_path / "copy") == (1, "model: damaged: README.md, model.safetensors")
    (tmp_path / "copy" / "manifest.json").write_text('{"name": "of another program"}')
    assert invoke("evaluate", tmp_path / "copy", "--sources", text)[0] == 0


def test_export_of_a_damaged_fine_tune_is_refused(finished: Finished, tmp_path: Path) -> None:
    """Before (af276e38): `export` wrote the damaged weights, exit 0."""
    lose_page(finished.directory / "finetuned" / "model.safetensors")
    code, output = invoke("export", finished.directory, "--output", tmp_path / "copy")
    assert (code, "finetuned/model.safetensors in" in output, "stage finetune" in output) == (1, True, True), output
    assert not (tmp_path / "copy").exists()


def test_verify_lists_each_stage_and_what_is_damaged(finished: Finished) -> None:
    assert invoke("verify", finished.directory) == (
        0,
        " ".join(
            f"{name}: ok"
            for name in (
                "run",
                "corpus",
                "seed",
                "cluster",
                "decompose",
                "submodels",
                "merge",
                "finetune",
                "evaluate",
                "export",
            )
        ),
    )
    flip_bit(finished.directory / "clusters" / "shards" / "0" / "part-00000.npy")
    (finished.directory / "merged" / "merge.json").unlink()
    flip_bit(finished.directory / "seed" / "manifest.json")
    change_digit(finished.directory / "config.json", '"seed": ')
    code, output = invoke("verify", finished.directory)
    assert code == 1
    assert "run: damaged: config.json corpus: ok seed: damaged: manifest.json" in output
    assert "cluster: damaged: shards/0/part-00000.npy" in output
    assert "merge: damaged: merge.json" in output
    assert "submodels: ok" in output


@pytest.mark.parametrize(
    "file", ["clusters/cluster_model/clusters.npz", "corpus/validation/part-00000.parquet", "seed/model.safetensors"]
)
def test_what_only_the_evaluation_reads_is_verified_before_the_training(finished: Finished, file: str) -> None:
    """Before (af276e38): with each of these files the run trained, evaluated and exported, exit 0."""
    finished.remove_after("decomposed")
    flip_bit(finished.directory / file)
    before = len(EventLog.read(finished.directory / "events.jsonl"))
    with pytest.raises(MoeDiscoError, match=rf"{file} in .* is damaged"):
        run(finished)
    events = EventLog.read(finished.directory / "events.jsonl")[before:]
    assert [event.stage for event in events if event.type == "stage_started"] == []


def test_repair_makes_the_damaged_stage_again_and_keeps_what_fits(finished: Finished) -> None:
    """The repaired seed is the same, bit for bit, so what was made from it stays.

    Before (af276e38): the damaged merge was fine-tuned without a word.
    """
    shutil.rmtree(finished.directory / "finetuned")
    flip_bit(finished.directory / "merged" / "model.safetensors")
    with pytest.raises(MoeDiscoError, match=r"merged/model\.safetensors in .* is damaged: .* stage merge wrote"):
        run(finished)
    flip_bit(finished.directory / "seed" / "model.safetensors")
    assert run(finished, repairs=True) == ["seed", "merge", "finetune"]
    assert results(finished.directory) == results(finished.copy)
    warnings = [
        event.data["message"] for event in EventLog.read(finished.directory / "events.jsonl") if event.type == "warning"
    ]
    assert "damaged: model.safetensors of stage seed; the stage is made again" in warnings
    assert invoke("verify", finished.directory)[0] == 0


@pytest.mark.slow
def test_what_was_made_from_another_result_is_made_again(finished: Finished) -> None:
    """As after a repair on a GPU, whose result has other last bits.

    Before (af276e38): no stage was made again; the model was that of a seed which no longer existed.
    """
    flip_bit(finished.directory / "seed" / "model.safetensors")
    if (finished.directory / "seed" / "manifest.json").read_text().count('"checksum"'):
        accept_changes(finished.directory / "seed")
    again = run(finished)
    assert again[:2] == ["cluster", "decompose"]
    assert again[-1] == "export"


def test_an_interrupted_repair_leaves_nothing_that_does_not_fit(finished: Finished, tmp_path: Path) -> None:
    flip_bit(finished.directory / "submodels" / "0" / "model.safetensors")
    stop = tmp_path / "stop"

    def end(event: Event) -> None:
        if event.type == "stage_finished" and event.stage == "submodels":
            stop.write_text("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(finished.config, (end,), repairs=True, backend=LocalBackend(), stop=StopFile(stop))
    assert run(finished) == []
    assert results(finished.directory) == results(finished.copy)


def test_who_trusts_the_disk_reads_without_verifying(finished: Finished) -> None:
    finished.remove_after("submodels")
    flip_bit(finished.directory / "submodels" / "0" / "optimizer_state" / "exp_avg" / "model.safetensors")
    assert run(finished, verifies=False) == ["merge", "finetune", "evaluate", "export"]


@pytest.mark.parametrize("file", ["config.json", "run.json"])
def test_damaged_files_about_the_run_are_named_and_repaired(finished: Finished, file: str) -> None:
    """Before (af276e38): a changed seed in config.json was "a run with other settings", a changed id another run."""
    identity = json.loads((finished.directory / "run.json").read_text())["id"]
    change_digit(finished.directory / file, '"seed": ' if file == "config.json" else '"id": "')
    with pytest.raises(MoeDiscoError, match=rf"{file} in .* is damaged"):
        run(finished)
    assert run(finished, repairs=True) == []
    assert json.loads((finished.directory / "run.json").read_text())["id"] == identity
    assert run(finished) == []


def test_damaged_events_are_named_and_mended(finished: Finished) -> None:
    """Before (af276e38): the report showed a changed number of tokens, exit 0."""
    change_digit(finished.directory / "events.jsonl", '"tokens":')
    code, output = invoke("verify", finished.directory)
    assert (code, "run: damaged: events.jsonl corpus: ok" in output) == (1, True), output
    events: list[Event] = []
    pipeline.run(finished.config, (events.append,), backend=LocalBackend(), repairs=True)
    assert "damaged: events.jsonl of the run; it is made again; costs and curves lack the events that are lost" in [
        event.data.get("message") for event in events
    ]
    assert invoke("verify", finished.directory)[0] == 0


def test_a_redo_that_made_nothing_leaves_the_run_to_its_own_command(finished: Finished, tmp_path: Path) -> None:
    """Before (af276e38): "holds a run with other settings (...)": the original command was refused, too."""
    (tmp_path / "empty.txt").touch()
    source = finished.config.corpus.sources[0].model_copy(
        update={"path": str(tmp_path / "empty.txt"), "format": "text"}
    )
    changed = finished.config.model_copy(
        update={"corpus": finished.config.corpus.model_copy(update={"sources": (source,)})}
    )
    with pytest.raises(MoeDiscoError):
        pipeline.run(changed, backend=LocalBackend(), redo=True)
    assert run(finished) == []
    assert invoke("verify", finished.directory)[0] == 0


def test_a_redo_counts_from_the_first_stage_that_it_made(finished: Finished, tmp_path: Path) -> None:
    stop = tmp_path / "stop"

    def end(event: Event) -> None:
        if event.type == "stage_finished":
            stop.write_text("cancelled")

    changed = finished.config.model_copy(
        update={"merge": finished.config.merge.model_copy(update={"calibration_tokens": 1024})}
    )
    with pytest.raises(RunStopped):
        pipeline.run(changed, (end,), backend=LocalBackend(), redo=True, stop=StopFile(stop))
    with pytest.raises(MoeDiscoError, match=r"other settings \(merge.calibration_tokens\)"):
        run(finished)
    pipeline.run(changed, backend=LocalBackend())


def test_a_stage_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, every folder and the manifest is synced before the rename, and the parent folder after it.

    Before (af276e38): nothing was synced.
    """
    from moedisco_ray.core.store.artifacts import commit  # noqa: PLC0415  # not needed by the other tests

    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def record_sync(handle: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().relative_to(tmp_path)}")
        sync(handle)

    def record_rename(path: Path, target: Path) -> Path:
        done.append(f"rename {path.relative_to(tmp_path)}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with commit(tmp_path / "seed", "f") as draft:
        (draft.path / "state").mkdir()
        (draft.path / "state" / "file").write_bytes(b"1")
        (draft.path / "file").write_bytes(b"2")
    place = done.index("rename .seed.draft")
    draft_name = ".seed.draft"
    assert {f"sync {draft_name}", *(f"sync {draft_name}/{name}" for name in ("state", "state/file", "file"))} <= set(
        done[:place]
    )
    assert any("manifest.json" in each for each in done[:place])
    assert done[place:] == ["rename .seed.draft", "sync ."]
