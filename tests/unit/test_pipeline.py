"""The whole pipeline without Ray: starts that the Ray tests do not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moedisco_ray import pipeline
from moedisco_ray.artifacts import read_json
from moedisco_ray.errors import CheckpointError, ConfigError, CorpusError, RunDirError
from moedisco_ray.in_process import InProcess
from moedisco_ray.model_map import open_checkpoint

FEW_TOKENS = {"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4}


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    torch_generator = torch.random.get_rng_state()
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0))
    torch.random.set_rng_state(torch_generator)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def run(tmp_path: Path, **changes: Any) -> Path:
    return pipeline.run(small_config(tmp_path / "runs", tokens=FEW_TOKENS, **changes), shell=InProcess())


def test_a_checkpoint_goes_through_in_groups_of_experts(tmp_path: Path, mixtral: Path) -> None:
    directory = run(
        tmp_path, model={"family": "mixtral", "config": None, "init": {"checkpoint": str(mixtral)}},
        clusters={"count": 2, "vectors": "hidden_state"}, merge={"router": "ridge", "calibration_tokens": 1024})
    submodel = read_json(directory / "submodels" / "0" / "config.json")
    assert (submodel["num_local_experts"], submodel["num_experts_per_tok"]) == (2, 2)
    finished = open_checkpoint(directory / "model")
    assert set(finished) == set(open_checkpoint(mixtral))
    index = json.loads(next((directory / "model").glob("config.json")).read_text(encoding="utf-8"))
    assert index["num_local_experts"] == 4
    assert AutoModelForCausalLM.from_pretrained(directory / "model").config.model_type == "mixtral"


@pytest.mark.parametrize(("family", "sizes"), [
    ("qwen2_moe", {"norm_topk_prob": False, "shared_expert_intermediate_size": 24}), ("olmoe", {"norm_topk_prob": False})])
def test_families_with_unnormalised_routers(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    architecture = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "moe_intermediate_size": 32, "num_experts": 2,
        "num_experts_per_tok": 1, **sizes}
    directory = run(tmp_path, model={"family": family, "config": architecture})
    layers = read_json(directory / "merged" / "merge.json")["layers"]
    assert all(layer["scale"] > 1 for layer in layers)      # a softmax over two is below one: the experts make up for it
    stages = read_json(directory / "evaluation" / "evaluation.json")["stages"]
    assert stages["finetune"]["perplexity"] < 600


@pytest.fixture(scope="module")
def elaborate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with what the defaults leave out."""
    return run(
        tmp_path_factory.mktemp("elaborate"), clusters={"count": 2, "vectors": "mean_token", "capacity": None, "overlap": 0.2},
        merge={"backbone": "auto", "auto_scales": [0.5, 1.0], "auto_tokens": 1024})


def test_overlap_weights_and_no_balance(elaborate: Path) -> None:
    report = read_json(elaborate / "clusters" / "report.json")
    own = [entry["tokens"] for entry in report["clusters"]]
    assert all(packed > tokens for packed, tokens in zip(report["shard_tokens"], own, strict=True))


def test_the_best_merge_on_held_out_text_is_taken_and_reported(elaborate: Path) -> None:
    merged = read_json(elaborate / "merged" / "merge.json")
    losses = {(entry["rule"], entry["scale"]): entry["loss"] for entry in merged["candidates"]}
    assert len(losses) == 8
    assert all(0 < loss < 10 for loss in losses.values())
    assert losses[merged["backbone"]["rule"], merged["backbone"]["scale"]] == min(losses.values())
    reported = read_json(elaborate / "report.json")["merge"]
    assert reported["candidates"] == merged["candidates"]
    assert reported["backbone"] == merged["backbone"]


def test_rounds_and_an_anchored_backbone_end_in_the_report(tmp_path: Path) -> None:
    directory = run(tmp_path, submodels={"sync_every": 3, "backbone_lr_scale": 0.0, "backbone_lr_scale_from": 0.5})
    found = read_json(directory / "report.json")["rounds"]
    assert len(found) >= 1
    assert all(set(entry["members"]) == {"submodel-0", "submodel-1"} and entry["late"] == [] for entry in found)
    assert not (directory / "checkpoints").exists()


def test_another_familys_checkpoint_is_refused(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a model of family 'mixtral', but model.family is 'olmoe'"):
        run(tmp_path, model={"family": "olmoe", "config": None, "init": {"checkpoint": str(mixtral)}})
    assert not (tmp_path / "runs").exists()


def test_clusters_that_do_not_divide_a_checkpoints_experts_are_refused(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(ConfigError, match=r"clusters\.count"):
        run(tmp_path, model={"family": "mixtral", "config": None, "init": {"checkpoint": str(mixtral)}}, clusters={"count": 3})


def test_a_binary_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_bytes(bytes(range(256)) * 64)
    with pytest.raises(CorpusError, match=r"corpus\.sources\.0\.path"):
        run(tmp_path, corpus={"sources": [{"path": str(tmp_path / "photo.txt")}]})


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab"):
        run(tmp_path, model={"config": {"num_experts": 2, "vocab_size": 400}})


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(RunDirError, match="is not empty and holds no run"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "runs" / "small").iterdir()] == ["thesis.txt"]
