"""dots.llm1: attention as in Qwen3, and the router and the experts of DeepSeek-V3."""

from moedisco_ray.core.families.declaration import (
    ATTENTION,
    ATTENTION_BIAS,
    DENSE_MLP,
    NORMS,
    QK_NORM,
    Attention,
    Family,
    Gguf,
    SharedExpert,
)
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "dots1",
    num_experts_field="n_routed_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, QK_NORM, DENSE_MLP),
    router=Router(
        scores="sigmoid",
        correction="e_score_correction_bias",
        scaling_field="routed_scaling_factor",
        limits_groups=True,
        in_fp32=True,
        weights_in_fp32=True,
        least_in_group=2,
    ),
    attention=Attention(own_head_dim=True, biases="qkvo", bias_field="attention_bias", qk_norm="head"),
    shared=SharedExpert("shared_experts", count_field="n_shared_experts"),
    dense_layers_field="first_k_dense_replace",
    fields={
        "attention_bias": False,
        "intermediate_size": None,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    unsaid={"num_key_value_heads": 32, "intermediate_size": 10_944},
    constants={"sliding_window": None},  # every layer attends to the whole sequence
    dense={"qwen3": {}},
    gguf=Gguf(
        "dots1",
        fixed={"attention_bias": (False,), "sliding_window": (None,)},
        reads_tied=False,
        same={"num_key_value_heads": "num_attention_heads"},
    ),
)
