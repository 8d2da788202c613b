"""Experts off the device: the logits of the model in memory, bit for bit, and loads as of an LRU cache."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from moe_models import LENGTH, VOCAB, random_tensors, tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel

from benchmarks import expert_offload
from moedisco_ray.core.config import FAMILIES
from moedisco_ray.models import load_model, moe_blocks, write_checkpoint
from moedisco_ray.models.selected_experts import SelectedExperts
from moedisco_ray.models.streamed import Offload, open_offloaded

TOKENS = torch.arange(LENGTH).mul(7).remainder(VOCAB)[None]
EXPERTS = 8


def passes(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of a prompt, and then of single tokens, with a cache of keys and values."""
    cache, parts = DynamicCache(config=model.config), (TOKENS[:, :6], *TOKENS[:, 6:].split(1, dim=1))
    with torch.inference_mode():
        return [model(part, None, None, cache, use_cache=True).logits for part in parts]


def in_memory(directory: Path) -> PreTrainedModel:
    """transformers' model.

    Its weights are copied from the mapped file, because products in fp32 depend on how they are aligned.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def written(directory: Path, family: str, dtype: torch.dtype = torch.float32, **changes: int) -> dict[str, object]:
    config = tiny_config(family, EXPERTS, **{"dtype": str(dtype).removeprefix("torch."), **changes})
    write_checkpoint(directory, random_tensors(config, dtype).items(), config)
    return config


def loads(model: PreTrainedModel) -> list[int]:
    found = [block.get_submodule("experts") for block in moe_blocks(model).values()]
    assert all(isinstance(experts, SelectedExperts) for experts in found)
    return [experts.loads for experts in found]


@pytest.mark.parametrize(
    ("place", "resident", "dtype"),
    [
        ("cpu", 3, torch.float32),
        ("disk", None, torch.bfloat16),
        ("disk", 0, torch.float32),
        ("disk", EXPERTS, torch.bfloat16),
        pytest.param("cpu", 3, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("disk", None, torch.float32, marks=pytest.mark.slow),
        pytest.param("disk", 0, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("disk", EXPERTS, torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", [*FAMILIES, pytest.param("granitemoe", id="stacks")])
def test_logits_are_those_of_the_model_in_memory(family, dtype, place, resident, tmp_path):
    written(tmp_path, family, dtype)
    expected = passes(in_memory(tmp_path))
    model = open_offloaded(tmp_path, Offload(place, resident))
    assert model.dtype == dtype
    found = passes(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if resident == EXPERTS:
        assert max(loads(model)) <= EXPERTS


def test_stacks_of_a_saved_transformers_model_are_read_expert_by_expert(tmp_path):
    written(tmp_path / "canonical", "qwen3_moe")
    memory = load_model(tmp_path / "canonical").eval()
    memory.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in load_file(tmp_path / "stacked/model.safetensors")
    found, expected = (
        passes(open_offloaded(tmp_path / "stacked", Offload("disk"))),
        passes(in_memory(tmp_path / "stacked")),
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_experts_that_stay_are_those_used_last(tmp_path):
    written(tmp_path, "olmoe", num_experts_per_tok=1)
    model = open_offloaded(tmp_path, Offload("disk", resident=3))
    selected: list[list[int]] = []
    for block in moe_blocks(model).values():
        selected.append(order := [])
        block.get_submodule("experts").register_forward_pre_hook(
            lambda _, inputs, order=order: order.append(inputs[1].flatten().tolist())
        )
    with torch.inference_mode():
        for token in torch.arange(VOCAB).mul(13).remainder(VOCAB).view(-1, 1, 1):
            model(token)
    for order, count in zip(selected, loads(model), strict=True):
        cache = functools.lru_cache(maxsize=3)(lambda expert: expert)
        for (expert,) in order:
            cache(expert)
        assert count == cache.cache_info().misses
        assert 3 < count < VOCAB


def test_a_load_that_fails_leaves_no_wrong_expert(tmp_path):
    written(tmp_path, "olmoe")
    expected = passes(in_memory(tmp_path))
    model = open_offloaded(tmp_path, Offload("disk", resident=3))
    experts = moe_blocks(model)[1].get_submodule("experts")
    load, left = experts._load, iter([True, True, True, False])

    def interrupted(expert, targets):
        if not next(left, True):
            raise KeyboardInterrupt
        load(expert, targets)

    experts._load = interrupted
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        for token in TOKENS.view(-1, 1, 1):
            model(token)
    assert all(torch.equal(one, other) for one, other in zip(passes(model), expected, strict=True))


def test_it_generates_as_its_own_configuration_says(tmp_path):
    written(tmp_path, "qwen3_moe")
    GenerationConfig(eos_token_id=5, max_new_tokens=3, do_sample=True, temperature=0.4).save_pretrained(tmp_path)
    model = open_offloaded(tmp_path, Offload("cpu"))
    assert (
        model.generation_config.to_diff_dict()
        == AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.to_diff_dict()
    )


def test_its_benchmark_counts_what_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        expert_offload,
        "SIZES",
        expert_offload.SIZES
        | {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 32,
        },
    )
    written = expert_offload.prepare(tmp_path)
    assert 32 * 2 * 3 * 64 * 32 * 2 == written["expert_bytes"] < written["bytes"]
    found = {arm: expert_offload.measure(arm, tmp_path, "cpu") for arm in ("device", "cpu-16", "disk-4", "disk-32")}
    assert all(each["second_per_second"] > 0 for each in found.values())
    assert found["device"]["first_loaded"] == 0
    assert 0 < found["disk-32"]["first_loaded"] < found["cpu-16"]["first_loaded"] < found["disk-4"]["first_loaded"] <= 1
    assert found["disk-32"]["second_loaded"] < found["disk-32"]["first_loaded"]
