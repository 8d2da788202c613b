"""A run of Qwen1.5-MoE's structure, from sharded bf16 files to the export, survives the death of a gang's worker.

Weights are tiny, but 60 experts, a shared expert, 15 groups of 4 and a gang of 4 processes are as in a true run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dying_worker
import pytest
import ray
import torch
from dying_worker import MOMENTS, Moment
from pinned_runs import write_text, write_tokenizer
from small_run import begin_at
from transformers import AutoConfig, AutoModelForCausalLM

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.ray.session import NO_DASHBOARD
from moedisco_ray.models import open_checkpoint

EXPERTS, GROUPS, WORKERS, LENGTH, INTERVAL = 60, 15, 4, 64, 5
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


def write_start(home: Path) -> Path:
    """The text, and a checkpoint of bf16 weights in several files, with its tokenizer."""
    write_text(home / "text")
    directory = home / "start"
    vocabulary = write_tokenizer(directory, home / "text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "qwen2_moe",
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=64,
                num_experts=EXPERTS,
                num_experts_per_tok=4,
                vocab_size=vocabulary,
                max_position_embeddings=LENGTH,
                tie_word_embeddings=False,
            )
        )
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def config_of(home: Path, output: Path) -> RunConfig:
    recipe = {"batch_tokens": 512, "lr": 2e-3}
    return check_config(
        {
            "name": "structure",
            "output": str(output),
            "corpus": {
                "sources": [{"path": str(path), "name": path.stem} for path in sorted((home / "text").iterdir())],
                "validation_fraction": 0.05,
                "sequence_length": LENGTH,
            },
            "model": {"family": "qwen2_moe", "init": {"checkpoint": str(home / "start")}},
            "tokens": {"total": 40_000, "seed_share": 0.0, "finetune_share": 0.4},
            "clusters": {"count": GROUPS},
            "submodels": {"optimizer": recipe, "start_loss": None},  # the start has random weights
            "finetune": {"optimizer": recipe, "parallel": {"expert": 2}},
            "merge": {"calibration_tokens": 2048},
            "checkpoint": {"every": INTERVAL},
            "pools": {"low_memory": {"max_workers": 2}, "high_memory": {"workers": WORKERS}},
            "evaluation": {"max_tokens": 4000, "prompts": ["ab"]},
        }
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The whole run, in which no worker dies."""
    home = tmp_path_factory.mktemp("undisturbed")
    write_start(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with on_ray({}):
            pipeline.run(config_of(home, home / "runs"))
        yield home


@contextlib.contextmanager
def on_ray(variables: dict[str, str]) -> Iterator[None]:
    """A Ray cluster on this machine whose processes have these environment variables, and are armed if any is given."""
    environment: dict[str, Any] = {"env_vars": {**NO_DASHBOARD["env_vars"], **variables}}
    if variables:
        environment["worker_process_setup_hook"] = "dying_worker.arm"
    ray.init(
        address="local",
        num_cpus=6,
        resources={"low_mem_gpu": 2, "high_mem_gpu": WORKERS},
        include_dashboard=False,
        runtime_env=environment,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200_000_000,
    )
    try:
        yield
    finally:
        ray.shutdown()


def same_files(ours: Path, theirs: Path, part: str) -> None:
    names = sorted(path.name for path in (theirs / part).glob("*.safetensors"))
    assert names
    for name in names:
        assert (ours / part / name).read_bytes() == (theirs / part / name).read_bytes(), f"{part}/{name}"


def test_the_run_keeps_the_structure_of_its_start(undisturbed: Path) -> None:
    directory = undisturbed / "runs" / "structure"
    exported, start = open_checkpoint(directory / "model"), open_checkpoint(undisturbed / "start")
    assert {key: exported.shape(key) for key in exported} == {key: start.shape(key) for key in start}
    assert len(list((directory / "finetuned").glob("*.safetensors"))) == WORKERS
    submodel = json.loads((directory / "submodels" / "0" / "config.json").read_text())
    assert (submodel["num_experts"], submodel["shared_expert_intermediate_size"]) == (EXPERTS // GROUPS, 64)
    assert AutoModelForCausalLM.from_pretrained(directory / "model").config.num_experts == EXPERTS


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_dies_changes_nothing(
    undisturbed: Path, tmp_path: Path, moment: Moment, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = random.Random(moment)
    plan = {"load": numbers.randint(5, 20), "step": numbers.randint(7, 25), "save": numbers.randint(3, 20)}
    done, config = undisturbed / "runs" / "structure", config_of(undisturbed, tmp_path)
    begin_at("finetune", config, done)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    events: list[Event] = []
    variables = dying_worker.settings(
        tmp_path, moment, rank=numbers.randrange(WORKERS), calls=plan[moment], workers=WORKERS
    )
    with on_ray({**variables, "PYTHONPATH": str(Path(__file__).parent)}):
        pipeline.run(config, (events.append,))
    assert dying_worker.mark(tmp_path).exists()
    [restart] = [event for event in events if event.type == "worker_restarted"]
    again = [event.data["step"] for event in events if event.type == "progress" and event.time > restart.time]
    if moment == "load":
        assert min(again) == 1
    else:
        assert all(step > INTERVAL for step in again), "the gang continues from a checkpoint"
    for part in ("finetuned", "model"):
        same_files(config.directory, done, part)
    assert (
        read_json(config.directory / "evaluation" / "evaluation.json")["stages"]
        == read_json(done / "evaluation" / "evaluation.json")["stages"]
    )
