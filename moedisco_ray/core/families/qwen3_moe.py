"""Qwen3-MoE, and Qwen3-VL without its part for images.

In a text, all three positions of a token of Qwen3-VL are equal, so its language model computes as Qwen3 does.
"""

from moedisco_ray.core.families.composite import Composite
from moedisco_ray.core.families.declaration import (
    ATTENTION,
    ATTENTION_BIAS,
    DENSE_MLP,
    NORMS,
    QK_NORM,
    Attention,
    Family,
    Gguf,
)

FAMILY = Family(
    "qwen3_moe",
    num_experts_field="num_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, QK_NORM, DENSE_MLP),
    attention=Attention(own_head_dim=True, biases="qkvo", bias_field="attention_bias", qk_norm="head"),
    fields={"attention_bias": False},
    unsaid={"num_key_value_heads": 4},
    constants={"decoder_sparse_step": 1, "mlp_only_layers": []},  # every layer is an MoE layer
    dense={"qwen3": {}},
    composite=Composite(
        {"qwen3_vl_moe": "qwen3_moe", "qwen3_vl": "qwen3"},
        prefix="model.language_model.",
        others=("model.visual.",),
        ignored=("mrope_section", "mrope_interleaved"),
        values={"norm_topk_prob": True},
    ),
    gguf=Gguf(
        "qwen3moe", fixed={"norm_topk_prob": (True,), "attention_bias": (False,), "use_sliding_window": (False,)}
    ),
)
