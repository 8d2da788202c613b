"""Runs from a trained model: what a merge harms is exported as an ensemble, which every command uses or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_start import write_start
from small_run import begin_at, small_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.cli.chat import Chat
from moedisco_ray.cli.generation import open_model
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.limits import LOST_BY_MERGING
from moedisco_ray.core.records.finished_models import finished_model
from moedisco_ray.core.records.summaries import EvaluationRecord
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.plan import build_plan
from moedisco_ray.stages.export.ensemble import open_ensemble
from moedisco_ray.stages.export.modeling_ensemble import EnsembleForCausalLM


def config_at(home: Path, start: Path, lr: float, **changes: Any) -> RunConfig:
    return small_config(
        home / "runs",
        tokens={"total": 24_000, "seed_share": 0.0, "finetune_share": 0.0},
        clusters={"count": 2, "vectors": "hidden_state"},
        submodels={"optimizer": {"batch_tokens": 1024, "lr": lr}},
        model={"family": "mixtral", "config": None, "init": {"upcycle": str(start), "num_experts": 2}},
        merge={"calibration_tokens": 1024},
        evaluation={"max_tokens": 4000, "prompts": ["def"]},
        **changes,
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "llama")


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    """A run whose sub-models learn fast, and differ so much that a mean of their backbones is no good."""
    return pipeline.run(config_at(tmp_path_factory.mktemp("harmed"), start, 2e-2), backend=LocalBackend())


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory, harmed: Path, start: Path) -> Path:
    """A run whose sub-models are copies of the start, and so is the MoE merged from them."""
    config = config_at(tmp_path_factory.mktemp("unharmed"), start, 1e-9)
    begin_at("decompose", config, harmed)
    return pipeline.run(config, backend=LocalBackend())


def evaluation_of(run: Path) -> EvaluationRecord:
    return EvaluationRecord.model_validate(read_json(run / "evaluation" / "evaluation.json"))


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


def test_what_a_merge_harms_stays_apart(harmed: Path) -> None:
    found = evaluation_of(harmed)
    assert found.apart is not None
    assert found.ensemble is not None
    merged = {each.cluster: each for each in found.clusters}
    apart = {each.cluster: each for each in found.ensemble.clusters}
    assert merged.keys() == apart.keys() == {0, 1}
    assert [each.documents for each in merged.values()] == [each.documents for each in apart.values()]
    lost = {cluster: (merged[cluster].loss or 0) - (apart[cluster].loss or 0) for cluster in merged}
    assert found.apart.kept_apart
    assert lost[found.apart.cluster or 0] == max(lost.values()) > LOST_BY_MERGING
    assert sum((each.loss or 0) * each.tokens for each in apart.values()) == pytest.approx(
        (found.ensemble.loss or 0) * found.ensemble.tokens
    )


def test_show_report_card_and_summary_say_so(harmed: Path) -> None:
    found, report = evaluation_of(harmed), read_json(harmed / "report.json")
    words = report["submodels_apart"]
    assert words.startswith("the sub-models stay apart: merged, the model is ")
    card = (harmed / "model" / "README.md").read_text(encoding="utf-8")
    assert f"T{words[1:]}." in card
    assert "c-BTM" in card
    assert "## Samples" in card
    code, shown = invoke("show", str(harmed))
    assert code == 0
    assert words in shown
    assert "copy the merged model as a Hugging Face directory" in shown
    assert report["against_start"]["perplexity"] == pytest.approx(found.ensemble and found.ensemble.perplexity)
    summary = read_manifest(harmed / "evaluation")
    assert summary is not None
    assert summary.summary["perplexity"] == (found.ensemble and found.ensemble.perplexity)


def test_transformers_opens_the_model_of_the_run_and_writes(harmed: Path, start: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(harmed / "model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(harmed / "model")
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}, "as the start"
    ids = tokenizer("def", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert made.shape[1] == ids.shape[1] + 6
    exported = read_manifest(harmed / "model")
    assert exported is not None
    assert exported.summary["submodels"] == 2
    assert exported.summary["rounded_to"] == "bfloat16"
    assert [each["prompt"] for each in exported.summary["samples"]] == ["def"]
    assert exported.summary["samples"][0]["text"]
    assert (harmed / "model" / "LICENSE").read_bytes() == (start / "LICENSE").read_bytes()


def test_a_chat_with_it_needs_no_option(harmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = open_model(finished_model(harmed, ensemble=True), device="cpu")
    answer = Chat(model, tokenizer, max_tokens=4, temperature=0).answer("def")
    assert capsys.readouterr().out.strip() == answer.strip()


APART = "holds an ensemble of sub-models that stay apart; name what `moedisco export RUN_DIR --to hf` writes"


def test_what_cannot_use_it_says_so_in_one_line_and_names_the_merged_model(harmed: Path, tmp_path: Path) -> None:
    model, file = str(harmed / "model"), str(tmp_path / "file.gguf")
    for arguments, message in [
        (
            ["export", str(harmed), "--to", "gguf", "--output", str(tmp_path / "file.gguf")],
            f"RUN_DIR: '{model}': {APART}",
        ),
        (["export", model, "--to", "gguf", "--output", file], f"RUN_DIR: '{model}': {APART}"),
        (["evaluate", model, "--sources", str(harmed / "config.json")], f"MODEL: '{model}': {APART}"),
        (["experts", model, "0,1", "--output", str(tmp_path / "chosen")], f"'{model}': {APART}"),
        (["chat", str(harmed), "--experts"], "--experts: all of the sub-models compute each token"),
        (["chat", str(harmed), "--experts-on", "cpu"], "--experts-on: 'cpu': is impossible with sub-models that stay"),
    ]:
        code, output = invoke(*arguments)
        assert code == 2, output
        assert message in output
    for kind in ("upcycle", "checkpoint"):
        with pytest.raises(Exception, match=f"model.init.{kind}: '.*': {APART[:40]}"):
            small_config(tmp_path, model={"family": None, "config": None, "init": {kind: model}})
    assert not list(tmp_path.iterdir())
    code, output = invoke("export", str(harmed), "--to", "hf", "--output", str(tmp_path / "merged"))
    assert code == 0, output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == "mixtral"
    assert "The sub-models stay apart: merged" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


def test_samples_are_of_the_model_that_others_load(harmed: Path) -> None:
    whole = EnsembleForCausalLM.from_pretrained(harmed / "model", dtype=torch.float32)
    streamed, ids = open_ensemble(harmed / "model", "cpu"), torch.arange(3, 203)[None]
    with torch.inference_mode():
        expected, found = whole(ids).logits, streamed(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_a_merge_does_not_harm_is_merged(unharmed: Path) -> None:
    run, found = unharmed, evaluation_of(unharmed)
    assert found.apart is not None
    assert not found.apart.kept_apart
    assert found.apart.merged == pytest.approx(found.apart.apart, abs=LOST_BY_MERGING)
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.model_type == "mixtral"
    assert read_json(run / "report.json")["submodels_apart"].startswith("the sub-models are merged: ")
    assert "It was trained as MoE-DisCo" in (run / "model" / "README.md").read_text(encoding="utf-8")


def test_by_hand_nothing_is_measured_and_all_is_merged(harmed: Path, start: Path, tmp_path: Path) -> None:
    config = config_at(tmp_path, start, 2e-2, export={"keep_apart": "never"})
    begin_at("evaluate", config, harmed)
    run = pipeline.run(config, backend=LocalBackend())
    assert (evaluation_of(run).ensemble, evaluation_of(run).apart) == (None, None)
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.model_type == "mixtral"
    assert read_json(run / "report.json")["submodels_apart"] is None


def test_the_plan_counts_the_ensemble_in_runs_that_measure_it(start: Path, tmp_path: Path) -> None:
    pools = {name: {"gpu": 1, "card": "L4", "price_per_hour": 1.0} for name in ("low_memory", "high_memory")}
    auto = {each.stage: each for each in build_plan(config_at(tmp_path, start, 1e-3, pools=pools)).estimates}
    merged = config_at(tmp_path, start, 1e-3, pools=pools, export={"keep_apart": "never"})
    never = {each.stage: each for each in build_plan(merged).estimates}
    assert (auto["evaluate"].seconds or 0) > (never["evaluate"].seconds or 0) > 0
    assert {name for name in auto if auto[name].seconds != never[name].seconds} == {"evaluate"}
