"""Small checkpoints with names, dtypes and `config.json` of published ones whose weights are quantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moedisco_ray.models import canonical_shapes

GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 0,
    "experts_per_token": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "pad_token_id": 1,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 512,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 0,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "kv_lora_rank": 48,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 512,
}
_NOT_FP8 = ("embed_tokens", "norm", "lm_head", "mlp.gate.", "eh_proj")


def write_gpt_oss(directory: Path, files: int = 2, **changes: Any) -> Path:
    """gpt-oss with its experts in MXFP4."""
    config = GPT_OSS | changes
    shapes = canonical_shapes(_as_trained(config))
    packed = {name for name in shapes if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    tensors = _weights({name: shape for name, shape in shapes.items() if name not in packed})
    for name in packed:
        experts, columns, rows = shapes[name]
        shape = (experts, rows, columns // 32)
        generator = torch.Generator().manual_seed(len(name))
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 124, shape, dtype=torch.uint8, generator=generator)
    return _written(directory, config, tensors, files)


def write_deepseek_v3(directory: Path, **changes: Any) -> Path:
    """DeepSeek-V3 in fp8, with a layer that predicts a further token."""
    config = DEEPSEEK_V3 | changes
    rows, columns = config["quantization_config"]["weight_block_size"]
    tensors = _weights(canonical_shapes(_as_trained(config)))
    layers = config["num_hidden_layers"]
    last = {name: tensor for name, tensor in tensors.items() if f".layers.{layers - 1}." in name}
    tensors |= {name.replace(f".{layers - 1}.", f".{layers}.", 1): tensor.clone() for name, tensor in last.items()}
    hidden = config["hidden_size"]
    more = {"embed_tokens": (512, hidden), "eh_proj": (hidden, 2 * hidden), "shared_head.head": (512, hidden)}
    more |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    tensors |= {
        f"model.layers.{layers}.{name}.weight": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in more.items()
    }
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and not any(part in name for part in _NOT_FP8):
            tensors[name], tensors[f"{name}_scale_inv"] = _fp8(tensor.float(), rows, columns)
    return _written(directory, config, tensors, 2)


def _as_trained(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "quantization_config"}


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        found[name] = (1 + tensor / 10 if "norm" in name else tensor / 8).to(dtype)
    return found


def _fp8(tensor: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    height, width = (-(-size // block) for size, block in zip(tensor.shape, (rows, columns), strict=True))
    scales = torch.empty(height, width)
    found = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
    for i in range(height):
        for j in range(width):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = tensor[part].abs().max() / 448
            found[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return found, scales


def _written(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: int) -> Path:
    """Write files with an index, as published models have; a tensor and its scales may be in different ones."""
    directory.mkdir(parents=True, exist_ok=True)
    names, shards = sorted(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::files]}
        save_file(part, directory / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory
