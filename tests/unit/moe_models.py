"""Tiny models of every family, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from moedisco_ray.core.config import FAMILIES, Architecture
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import ModelMap, canonical_shapes, config_values, hf_config, stored_tensors
from moedisco_ray.models.hf import from_values
from moedisco_ray.training.sharded_files import read_tensors

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give

ALONE = tuple(family for family in FAMILIES if DECLARATIONS[family].router.least_in_group == 1)
"""Families whose model with one expert runs in transformers without `specialise`."""
UPCYCLED = tuple(family for family in FAMILIES if DECLARATIONS[family].router.only_top_k is None)
"""Families in which copies of an expert can compute what the expert does."""
VOCAB = 64
LENGTH = 16
MIXED = {
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
"""Configuration fields of a tiny model with a recurrent layer, then one with attention, and so on."""


def top_k_of(family: str, wanted: int) -> int:
    """The number of experts per token that the family can have in place of the wanted one."""
    return min(DECLARATIONS[family].router.only_top_k or wanted, wanted)


def tiny_config(family: str, num_experts: int = 4, **changes: Any) -> dict[str, Any]:
    """A `config.json` of a tiny model; `mlp_only_layers` and the like go in as they are."""
    fields = {name: changes.pop(name) for name in list(changes) if name in Architecture.model_fields}
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 8,
        "num_experts_per_tok": min(2, num_experts),
        "initializer_range": 0.2,
        **fields,
    }
    if DECLARATIONS[family].attention.latent:
        del sizes["num_key_value_heads"]
    if DECLARATIONS[family].recurrence is not None:
        interval = min(2, sizes["num_hidden_layers"])  # at least one layer has attention
        sizes["fields"] = {**MIXED, "full_attention_interval": interval, **sizes.get("fields", {})}
    architecture = Architecture(num_experts=num_experts, **sizes)
    return config_values(hf_config(family, architecture, VOCAB, LENGTH, 0)) | changes


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Canonical tensors, every one of them random: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = canonical_shapes(config)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def model_map(config: dict[str, Any]) -> ModelMap:
    return ModelMap(config["model_type"])


def built(config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A transformers model with these canonical tensors."""
    dtype = next(tensors[key].dtype for key in tensors)
    model = AutoModelForCausalLM.from_config(from_values(config)).to(dtype).eval()
    read_tensors(stored_tensors(model), tensors, model_map(config))
    return model


def in_memory(config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical tensors under the names that a transformers model has in memory, with stacked experts."""
    return {key: tensor.detach() for key, tensor in stored_tensors(built(config, tensors)).items()}


@st.composite
def moe(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
    """Configuration and tensors of some MoE, and a number of clusters that divides its experts."""
    family = draw(st.sampled_from(FAMILIES))
    page = DECLARATIONS[family]
    clusters, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    if clusters * group < page.router.least_in_group:
        group = page.router.least_in_group
    experts, layers = clusters * group, draw(st.integers(1, 3))
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if page.dense_layers_field is not None:
        changes[page.dense_layers_field] = draw(st.integers(0, layers - 1))
    if page.router.limits_groups and group > 1:
        changes["n_group"], changes["topk_group"] = clusters, draw(st.integers(1, clusters))
        changes["num_experts_per_tok"] = draw(st.integers(1, changes["topk_group"] * group))
    if "mlp_only_layers" in page.constants:
        changes["mlp_only_layers"] = draw(st.lists(st.integers(0, layers - 1), unique=True))
    config = tiny_config(family, experts, **changes)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return config, random_tensors(config, dtype, draw(st.integers(0, 2**31))), clusters
