"""Directories as the export stage writes them, of tiny models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf_files import TEXT
from moe_models import random_tensors, tiny_config
from transformers import AutoTokenizer, GenerationConfig

from moedisco_ray.models import write_checkpoint
from moedisco_ray.models.shard_file import Stored
from moedisco_ray.stages.text.tokenizer import save_trained, train_bpe

NEEDED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 2},
    "deepseek_v2": {"norm_topk_prob": False},
    "dots1": {"num_key_value_heads": 2},
    "qwen3_next": {"linear_value_head_dim": 8},
    "qwen3_5_moe_text": {"linear_value_head_dim": 8},
}
"""Settings that llama.cpp needs, where the default is another."""


def write_model(
    directory: Path, family: str, dtype: torch.dtype = torch.float32, zero: tuple[str, ...] = (), **changes: Any
) -> dict[str, Any]:
    """Write a model with a tokenizer, and three rows of the embedding without a token."""
    save_trained(train_bpe(TEXT * 4, 300), directory)
    return write_weights(directory, family, dtype, zero, **changes)


def write_weights(
    directory: Path, family: str, dtype: torch.dtype = torch.float32, zero: tuple[str, ...] = (), **changes: Any
) -> dict[str, Any]:
    """Write a model for the tokenizer of a directory. Tensors whose names end with a text of `zero` are zero."""
    size = len(AutoTokenizer.from_pretrained(directory)) + 3
    config = tiny_config(
        family,
        4,
        **{"hidden_size": 32, "vocab_size": size, "max_position_embeddings": 64, **NEEDED.get(family, {}), **changes},
    )
    tensors = {
        key: (1 + tensor / 10 if "norm" in key else tensor / 5).to(dtype)
        for key, tensor in random_tensors(config).items()
    }
    for key, tensor in tensors.items():
        if key.endswith(zero):
            tensor.zero_()
    write_checkpoint(
        directory, tensors.items(), config, layout={key: Stored(tuple(x.shape), dtype) for key, x in tensors.items()}
    )
    GenerationConfig(eos_token_id=0).save_pretrained(directory)
    return config
