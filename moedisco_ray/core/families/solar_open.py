"""Solar Open. Its router and experts are those of GLM-4.5, and its attention is Llama's."""

from moedisco_ray.core.families.declaration import (
    ATTENTION,
    ATTENTION_BIAS,
    NORMS,
    Attention,
    Family,
    Gguf,
    SharedExpert,
)
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "solar_open",
    num_experts_field="n_routed_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS),
    router=Router(
        scores="sigmoid",
        correction="e_score_correction_bias",
        scaling_field="routed_scaling_factor",
        limits_groups=True,
        in_fp32=True,
        weights_in_fp32=True,
        least_in_group=2,
    ),
    attention=Attention(own_head_dim=True, biases="qkv", bias_field="attention_bias"),
    shared=SharedExpert("shared_experts", count_field="n_shared_experts"),
    fields={
        "attention_bias": False,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    unsaid={"num_key_value_heads": 8, "head_dim": 128},
    dense={"qwen2": {}, "llama": {}},
    gguf=Gguf("glm4moe"),
    in_transformers_4=False,
)
