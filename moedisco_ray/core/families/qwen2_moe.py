"""Qwen1.5-MoE and Qwen2-MoE."""

from moedisco_ray.core.families.declaration import (
    ATTENTION,
    ATTENTION_BIAS,
    DENSE_MLP,
    NORMS,
    Attention,
    Family,
    Gguf,
    SharedExpert,
)

FAMILY = Family(
    "qwen2_moe",
    num_experts_field="num_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, DENSE_MLP),
    attention=Attention(biases="qkv", bias_field="qkv_bias"),
    shared=SharedExpert("shared_expert", gate="shared_expert_gate", size_field="shared_expert_intermediate_size"),
    fields={"qkv_bias": True},
    unsaid={"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632},
    constants={"decoder_sparse_step": 1, "mlp_only_layers": []},  # every layer is an MoE layer
    dense={"qwen2": {}, "llama": {}},
    gguf=Gguf("qwen2moe", fixed={"norm_topk_prob": (False,), "use_sliding_window": (False,)}, reads_tied=False),
)
