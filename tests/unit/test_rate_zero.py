"""A run from a trained MoE whose learning rate is as good as zero ends with the start's weights, by every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pinned_runs
import pytest
import torch
from safetensors.torch import load_file

from moedisco_ray.core.config import check_config
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

RATE = 1e-30
"""A step at this rate is lost in rounding to float32."""
JOINT = {"seed_share": 0.0, "finetune_share": 1.0}
PARTS = {"seed_share": 0.0, "finetune_share": 0.4}
WAYS: dict[str, dict[str, Any]] = {
    "joint": {"tokens": JOINT},
    "streamed": {"tokens": JOINT, "pools": {"high_memory": {"memory": "streamed"}}},
    "sub-models": {"tokens": PARTS, "submodels": {"sync_every": None}},
    "sub-models that sync": {"tokens": PARTS},
}


@pytest.mark.parametrize("way", WAYS)
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
