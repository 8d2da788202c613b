"""Write an exported model as a GGUF file, which llama.cpp and the programs built on it read.

The writer of the `gguf` package writes the file. A family's declaration says how llama.cpp runs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from moedisco_ray.contrib.gguf.rotation import add_rotation, add_sections, check_rotation, rotation_of
from moedisco_ray.contrib.gguf.tensors import gguf_tensors
from moedisco_ray.contrib.gguf.tokenizer import add_tokenizer
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import DECLARATIONS, Family, Gguf
from moedisco_ray.models import open_checkpoint
from moedisco_ray.models.hf import from_values
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.export.origin import end_tokens

_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}

_SCORES = {"softmax": gguf.ExpertGatingFuncType.SOFTMAX, "sigmoid": gguf.ExpertGatingFuncType.SIGMOID}


def write_gguf(directory: Path, file: Path, *, name: str) -> dict[str, int]:
    """Write a Hugging Face directory as a GGUF file, tensor by tensor, in the dtype of the directory.

    Args:
        directory: An exported model with its tokenizer.
        file: File to write.
        name: Name of the model in the file.

    Returns:
        `parameters` (values in the file) and `bytes` of the file.

    Raises:
        CheckpointError: llama.cpp does not know the family, or computes it differently.
        ConfigError: The tokenizer has no name in llama.cpp.
    """
    weights = open_checkpoint(directory)
    # Fields that an older `config.json` lacks have the defaults of transformers.
    family, config = weights.model_map.family, {**from_values(weights.config).to_dict(), **weights.config}
    writer = gguf.GGUFWriter(file, check_gguf(family, config).architecture)
    tensors = gguf_tensors(weights)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[tensors[0].dtype])
    _add_parameters(writer, family, config)
    add_tokenizer(writer, load_pretrained(directory), int(config["vocab_size"]), ends=end_tokens(directory))
    for each in tensors:
        # As bytes, because numpy has no bf16.
        shape = (*each.shape[:-1], each.shape[-1] * each.dtype.itemsize)
        writer.add_tensor_info(each.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=each.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in tensors:
        writer.write_tensor_data(each.read().to(each.dtype).contiguous().view(torch.uint8).numpy())
    writer.close()
    return {"parameters": sum(math.prod(each.shape) for each in tensors), "bytes": file.stat().st_size}


def check_gguf(family: Family, config: Mapping[str, Any]) -> Gguf:
    """Check that llama.cpp computes a model as transformers does.

    Args:
        family: Family of the model.
        config: Values of the model's `config.json`.

    Raises:
        CheckpointError: llama.cpp does not know the family, or computes a setting differently.
    """
    if family.gguf is None:
        known = ", ".join(name for name, each in DECLARATIONS.items() if each.gguf is not None)
        raise CheckpointError(
            "model_type", family.name, f"llama.cpp {family.not_in_gguf}; use `--to hf`, or one of {known}"
        )
    for field, values in family.gguf.fixed.items():
        found = family.value(config, field)
        if field in config and found not in values:
            allowed = " or ".join(map(repr, values))
            raise CheckpointError(field, found, f"llama.cpp runs {family.name} only with {allowed}; use `--to hf`")
    for field, other in family.gguf.same.items():
        found, needed = family.value(config, field), family.value(config, other)
        if found != needed:
            raise CheckpointError(field, found, f"llama.cpp runs {family.name} only with {needed}; use `--to hf`")
    check_rotation(family, config)
    return family.gguf


def _add_parameters(writer: gguf.GGUFWriter, family: Family, config: Mapping[str, Any]) -> None:
    layers, heads, hidden = (int(config[name]) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    rotation = rotation_of(config)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    if config.get("intermediate_size") is not None:
        writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_head_count(heads)
    if family.attention.latent:
        _add_latent_attention(writer, config)
    else:
        size = int(config.get("head_dim") or hidden // heads)
        writer.add_head_count_kv(int(config["num_key_value_heads"]))
        writer.add_key_length(size)
        writer.add_value_length(size)
        rotated = int(size * rotation.get("partial_rotary_factor", 1))
        writer.add_rope_dimension_count(rotated)
        if family.gguf is not None and family.gguf.has_sections:
            add_sections(writer, rotated // 2)
    if family.attention.sinks:
        writer.add_sliding_window(int(config["sliding_window"]))
    if family.gguf is not None:
        for field, name in family.gguf.scales.items():
            writer.add_float32(f"{family.gguf.architecture}.{name}", float(config[field]))
    add_rotation(writer, rotation)
    if family.recurrence is not None:
        _add_recurrence(writer, config, interval=int(family.read_fields(config)[family.recurrence.interval_field]))
    _add_experts(writer, family, config)


def _add_latent_attention(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """llama.cpp runs latent attention with one head of keys and values, of the rank of the latent vector."""
    rank, rotated, kept = (int(config[name]) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(int(config.get("q_lora_rank") or 0))
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rotated)
    writer.add_value_length(rank)
    writer.add_key_length_mla(kept + rotated)
    writer.add_value_length_mla(int(config["v_head_dim"]))
    writer.add_rope_dimension_count(rotated)


def _add_recurrence(writer: gguf.GGUFWriter, config: Mapping[str, Any], *, interval: int) -> None:
    """llama.cpp has one size for the heads of keys and of values."""
    values, size = int(config["linear_num_value_heads"]), int(config["linear_key_head_dim"])
    writer.add_full_attention_interval(interval)
    writer.add_ssm_conv_kernel(int(config["linear_conv_kernel_dim"]))
    writer.add_ssm_group_count(int(config["linear_num_key_heads"]))
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_state_size(size)
    writer.add_ssm_inner_size(values * size)


def _add_experts(writer: gguf.GGUFWriter, family: Family, config: Mapping[str, Any]) -> None:
    router, size = family.router, int(config[family.expert_size_field])
    writer.add_expert_count(int(config[family.num_experts_field]))
    writer.add_expert_used_count(int(config[router.top_k_field]))
    writer.add_expert_feed_forward_length(size)
    writer.add_expert_gating_func(_SCORES[router.scores])
    writer.add_expert_weights_norm(router.normalised(config.get("norm_topk_prob")))
    writer.add_expert_weights_scale(router.scaling(config))
    groups = router.groups(config)
    if groups is not None:
        writer.add_expert_group_count(groups[0])
        writer.add_expert_group_used_count(groups[1])
    if family.dense_layers_field is not None:
        writer.add_leading_dense_block_count(family.dense_layers(config))
    shared = family.shared
    if shared is not None and shared.count_field is not None:
        count = int(config[shared.count_field] or 0)
        writer.add_expert_shared_count(count)
        if family.gguf is not None and family.gguf.needs_interval:
            writer.add_interleave_moe_layer_step(1)
            writer.add_expert_shared_feed_forward_length(size * count)
    elif shared is not None and shared.size_field is not None:
        writer.add_expert_shared_feed_forward_length(int(config[shared.size_field]))
