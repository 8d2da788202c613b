"""Tiny models of every family, for tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from moedisco_ray.core.config import FAMILIES, Architecture
from moedisco_ray.models import ModelMap, canonical_shapes, config_values, hf_config

torch.set_num_threads(1)     # tiny tensors: threads cost more than they give

VOCAB = 64
LENGTH = 16


def tiny_config(family: str, num_experts: int = 4, **changes: Any) -> dict[str, Any]:
    """A `config.json` of a tiny model; `mlp_only_layers` and the like go in as they are."""
    fields = {name: changes.pop(name) for name in list(changes) if name in Architecture.model_fields}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "moe_intermediate_size": 8, "num_experts_per_tok": min(2, num_experts), "initializer_range": 0.2, **fields}
    if family == "mixtral":
        sizes["norm_topk_prob"] = True
    architecture = Architecture(num_experts=num_experts, **sizes)
    return config_values(hf_config(family, architecture, VOCAB, LENGTH, 0)) | changes


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32,
                   seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical tensors, every one of them random: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = canonical_shapes(config)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def model_map(config: dict[str, Any]) -> ModelMap:
    return ModelMap(config["model_type"])


@st.composite
def moe(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
    """Configuration and tensors of some MoE, and a number of clusters that divides its experts."""
    family = draw(st.sampled_from(FAMILIES))
    clusters, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts, layers = clusters * group, draw(st.integers(1, 3))
    changes: dict[str, Any] = {"num_hidden_layers": layers, "num_experts_per_tok": draw(st.integers(1, experts)),
                               "tie_word_embeddings": draw(st.booleans())}
    if family in ("qwen2_moe", "qwen3_moe"):
        changes["mlp_only_layers"] = draw(st.lists(st.integers(0, layers - 1), unique=True))
    config = tiny_config(family, experts, **changes)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return config, random_tensors(config, dtype, draw(st.integers(0, 2**31))), clusters
