"""A run from a trained MoE whose learning rate is as good as zero ends with the start's weights, by every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pinned_runs
import pytest
import torch
from safetensors.torch import load_file

from moedisco_ray.core.config import check_config
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

RATE = 1e-30
"""A step at this rate is lost in rounding to float32."""
JOINT = {"seed_share": 0.0, "finetune_share": 1.0}
PARTS = {"seed_share": 0.0, "finetune_share": 0.4}
BY_MEMBERS = {
    "tokens": {"seed_share": 1.0, "finetune_share": 0.0},
    "clusters": {"count": 1},
    "submodels": {"seed_members": 2, "sync_bits": 4, "start_loss": 0.0},
}
WAYS: dict[str, dict[str, Any]] = {
    "adapters": {"tokens": JOINT, "finetune": {"lora": {"rank": 4}}},
    "streamed": {"tokens": JOINT, "pools": {"high_memory": {"memory": "streamed"}}},
    "sub-models that sync": {"tokens": PARTS},
    "members that stream": BY_MEMBERS | {"pools": {"low_memory": {"memory": "streamed"}}},
}


@pytest.mark.parametrize(
    "way",
    [
        "adapters",
        "sub-models that sync",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("streamed", "members that stream")),
    ],
)
def test_a_run_at_a_rate_of_zero_gives_the_start_back(tmp_path: Path, way: str) -> None:
    pinned = pinned_runs.config_of("olmoe", tmp_path)
    raw = pinned.model_dump(mode="json", exclude={"model": {"config"}}) | {"name": "zero"}
    raw["merge"]["router"] = None
    raw["tokens"]["total"] = 8_000
    raw["evaluation"]["prompts"] = []
    for section in ("submodels", "finetune"):
        raw[section]["optimizer"]["lr"] = RATE
    for section, values in WAYS[way].items():
        for name, value in values.items():
            if isinstance(value, dict):
                raw[section][name] |= value
            else:
                raw[section][name] = value
    directory = pipeline.run(check_config(raw), backend=LocalBackend())
    [start] = (tmp_path / "start").glob("*.safetensors")
    before, after = load_file(start), load_file(directory / "finetuned" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name].to(tensor.dtype)), name
    if way.startswith("members"):
        check_said_of_members(directory)


def check_said_of_members(directory: Path) -> None:
    """What is done per cluster was not done, and no one is led to believe that it was."""
    report = read_json(directory / "report.json")
    assert (report["members"], report["submodels_apart"], report["decompose"]) == (2, None, {})
    assert len(report["syncs"]) == 2
    assert not (directory / "decomposed" / "experts.json").exists()
    card = (directory / "model" / "README.md").read_text(encoding="utf-8")
    assert "The whole of it was trained by 2 members: each had a low-memory worker" in card
    assert "they combined all their weights 2 times" in card
    assert "The weights that it started from are those of `start`" in card
    assert "upcycled" not in card
