"""Models that read images too, as transformers stores them and as they are published: the part for text is a start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import LENGTH, built, tiny_config
from safetensors.torch import load_file, save_file
from test_upcycle import DENSE_SIZES, IDS, declared, logits, upcycled
from transformers import AutoConfig, AutoModelForImageTextToText

from moedisco_ray.core.config import Model
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.models import check_start_tensors, open_checkpoint, read_config

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
EXPERTS = 8


def stored(kind: str, text: dict[str, Any], directory: Path) -> torch.Tensor:
    """Store a model with all tensors random, and return the logits of its language model."""
    vision = VISION | ({"deepstack_visual_indexes": [0]} if kind.startswith("qwen3_vl") else {})
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    ).eval()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(directory)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.ecosystem("Start: MoE of every family", "transformers", "torch")
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("size", [8, 12])  # of an expert: the gate and up projections of 8 are square
def test_the_language_model_of_qwen3_vl_is_a_qwen3_moe(tmp_path: Path, size: int, published: bool) -> None:
    text = tiny_config("qwen3_moe", EXPERTS, moe_intermediate_size=size) | {"rope_parameters": ROPE}
    expected = stored("qwen3_vl_moe", text | {"model_type": "qwen3_vl_moe_text"}, tmp_path)
    if published:
        found = load_file(tmp_path / "model.safetensors")
        turned = {name: found[name].transpose(1, 2).contiguous() for name in found if ".experts." in name}
        save_file(found | turned, tmp_path / "model.safetensors", {"format": "pt"})
    section = with_start(Model.model_validate({"init": {"checkpoint": str(tmp_path)}}))
    assert (section.family_name, section.architecture.num_experts) == ("qwen3_moe", EXPERTS)
    check_start_tensors(section)
    config = read_config(tmp_path)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    with torch.no_grad():
        assert torch.equal(built(config, dict(open_checkpoint(tmp_path)))(IDS).logits, expected)


@pytest.mark.ecosystem("Start: dense model of every relative", "transformers", "torch")
@pytest.mark.parametrize(("kind", "family"), [("qwen3_vl", "qwen3_moe"), ("qwen3_5", "qwen3_5_moe_text")])
def test_the_dense_language_model_is_a_start_of_upcycling(tmp_path: Path, kind: str, family: str) -> None:
    text = {**declared(f"{kind}_text", DENSE_SIZES), "rope_parameters": ROPE, "model_type": f"{kind}_text"}
    expected = stored(kind, text, tmp_path / "dense")
    predicting = {"mtp.layers.0.mlp.up_proj.weight": torch.zeros(1)} if kind == "qwen3_5" else {}
    found = load_file(tmp_path / "dense" / "model.safetensors")
    save_file(found | predicting, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    section = with_start(Model.model_validate({"init": {"upcycle": str(tmp_path / "dense"), "num_experts": 4}}))
    assert section.family_name == family
    check_start_tensors(section)
    whole = upcycled(tmp_path / "moe", family, tmp_path / "dense")
    assert json.loads((whole / "config.json").read_text())["max_position_embeddings"] == LENGTH
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-5)
