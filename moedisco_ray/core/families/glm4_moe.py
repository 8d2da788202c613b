"""GLM-4.5 and GLM-4.6."""

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
    "glm4_moe",
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
    attention=Attention(
        partial_rotation=True,
        own_head_dim=True,
        biases="qkv",
        bias_field="attention_bias",
        qk_norm="head",
        qk_norm_field="use_qk_norm",
    ),
    shared=SharedExpert("shared_experts", count_field="n_shared_experts"),
    dense_layers_field="first_k_dense_replace",
    prediction_layers_field="num_nextn_predict_layers",
    fields={
        "attention_bias": False,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "intermediate_size": None,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    unsaid={"num_key_value_heads": 8, "intermediate_size": 10_944, "first_k_dense_replace": 1},
    gguf=Gguf("glm4moe"),
    # These dense models rotate whole heads.
    dense={
        "qwen3": {"use_qk_norm": True, "partial_rotary_factor": 1.0},
        "qwen2": {"partial_rotary_factor": 1.0},
        "llama": {"partial_rotary_factor": 1.0},
    },
)
