"""`moedisco export`: the model of a run that is not finished."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import OneCorpus, small_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunError, RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution import export_run, pipeline
from moedisco_ray.models import check_same, open_checkpoint
from moedisco_ray.stages.export import directory
from moedisco_ray.stages.train.finetune import job_of
from moedisco_ray.training import write_partial_result
from moedisco_ray.training.checkpoints import checkpoint

TOKENS = {"total": 16_000, "seed_share": 0.0, "finetune_share": 0.5}


def stopped(config: RunConfig, stop: StopFile, stage: str, step: int) -> None:
    """Run until a stage starts, or until the step of its training."""

    def ask(event: Event) -> None:
        if event.stage == stage and event.type in ("stage_started", "progress") and event.data.get("step", 0) >= step:
            stop.request("budget")

    with pytest.raises(RunStopped):
        pipeline.run(config, (ask,), backend=OneCorpus(), stop=stop)


def export(run: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", str(run), *options])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def in_finetune(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was stopped in the middle of its fine-tune."""
    return stopped_in_finetune(tmp_path_factory.mktemp("run"))


def stopped_in_finetune(home: Path, **changes: Any) -> RunConfig:
    config = small_config(home / "runs", tokens=TOKENS, checkpoint={"every": 4}, **changes)
    stopped(config, StopFile(home / "stop"), "finetune", 5)
    return config


def test_the_newest_checkpoint_becomes_a_model_that_transformers_loads(in_finetune: RunConfig, tmp_path: Path) -> None:
    check_export(in_finetune, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_adapters_becomes_a_whole_model(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    check_export(stopped_in_finetune(tmp_path_factory.mktemp("run"), finetune={"lora": {"rank": 4}}), tmp_path)
    assert (tmp_path / "model" / "adapter" / "adapter_config.json").is_file()


def check_export(run: RunConfig, tmp_path: Path) -> None:
    code, output = export(run.directory, "--from-checkpoint", "--output", str(tmp_path / "model"), "--json")
    assert code == 0, output
    context = export_run.context_of(run, export_run.RunStore.of(run.location))
    job = job_of(context)
    reference = dataclasses.replace(job, output=job.output.with_name("reference"))
    write_partial_result(reference)
    check_same(open_checkpoint(tmp_path / "model"), open_checkpoint(reference.output))
    found = json.loads(output)
    assert found["step"] == checkpoint.latest(job.checkpoints) > 0
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    with torch.no_grad():
        assert model(**tokenizer("def ", return_tensors="pt")).logits.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # no copy of the checkpoint is left


def test_an_export_that_fails_leaves_no_half_model(
    in_finetune: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"

    def fails(*_: Any) -> None:
        assert not target.exists(), "a crash at this moment would leave half a model"
        raise RunError("the logits differ")

    monkeypatch.setattr(directory, "check_logits", fails)
    code, output = export(in_finetune.directory, "--from-checkpoint", "--output", str(target))
    assert (code, [*tmp_path.iterdir()]) == (1, []), output
    assert "the logits differ" in output


def test_a_directory_that_cannot_be_replaced_is_refused(
    in_finetune: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for target in (".", "..", str(tmp_path / "link")):
        code, output = export(in_finetune.directory, "--from-checkpoint", "--output", target)
        assert code == 2
        assert "; choose another directory" in output


def test_without_a_finished_fine_tune_the_message_names_the_option(in_finetune: RunConfig, tmp_path: Path) -> None:
    code, output = export(in_finetune.directory, "--output", str(tmp_path / "model"))
    assert code == 2
    assert "has no finished fine-tune; pass --from-checkpoint" in output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, output = export(in_finetune.directory, "--from-checkpoint", "--output", str(tmp_path / "full"))
    assert code == 2
    assert "--output" in output
    assert "is not an empty directory; choose another directory" in output


def test_a_damaged_checkpoint_is_refused(in_finetune: RunConfig, tmp_path: Path) -> None:
    newest = max(in_finetune.directory.glob("checkpoints/finetune-*/**/step-*"))
    [file] = newest.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, output = export(in_finetune.directory, "--from-checkpoint", "--output", str(tmp_path / "model"))
    assert code == 1
    assert "is damaged" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_ended_after_its_fine_tune_exports_that(tmp_path: Path) -> None:
    config = small_config(tmp_path / "runs", tokens={**TOKENS, "total": 8_000})
    stopped(config, StopFile(tmp_path / "stop"), "evaluate", 0)
    code, output = export(config.directory, "--output", str(tmp_path / "model"))
    assert code == 0, output
    check_same(open_checkpoint(tmp_path / "model"), open_checkpoint(config.directory / "finetuned"))
    (tmp_path / "file").touch()
    code, output = export(config.directory, "--output", str(tmp_path / "file"))
    assert (code, "--output" in output) == (2, True), output


@pytest.mark.slow
@pytest.mark.parametrize("gone", [True, False])
def test_the_text_may_be_gone_or_changed(tmp_path: Path, gone: bool) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"sentence {i} of a text about the number {i * i}" for i in range(3000)))
    source = {"sources": [{"path": str(text)}], "sequence_length": 32, "validation_fraction": 0.1}
    config = small_config(tmp_path / "runs", tokens=TOKENS, checkpoint={"every": 4}, corpus=source)
    stopped(config, StopFile(tmp_path / "stop"), "finetune", 5)
    text.unlink() if gone else text.write_text("another text")
    code, output = export(config.directory, "--from-checkpoint", "--output", str(tmp_path / "model"))
    assert code == 0, output
