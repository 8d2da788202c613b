"""Qwen3-MoE."""

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
    gguf=Gguf(
        "qwen3moe", fixed={"norm_topk_prob": (True,), "attention_bias": (False,), "use_sliding_window": (False,)}
    ),
)
