"""DeepSeek-V3 and its relatives with the same `model_type`, such as Moonlight and Kimi-VL's language model."""

from moedisco_ray.core.families.declaration import (
    DENSE_MLP,
    LATENT_ATTENTION,
    LATENT_NORM,
    NORMS,
    Attention,
    Family,
    Gguf,
    SharedExpert,
)
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "deepseek_v3",
    num_experts_field="n_routed_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, LATENT_ATTENTION, LATENT_NORM, DENSE_MLP),
    router=Router(
        scores="sigmoid",
        correction="e_score_correction_bias",
        scaling_field="routed_scaling_factor",
        limits_groups=True,
        in_fp32=True,
        weights_in_fp32=True,
        least_in_group=2,
    ),
    attention=Attention(latent=True, partial_rotation=True, biases="qkvo", bias_field="attention_bias"),
    shared=SharedExpert("shared_experts", count_field="n_shared_experts"),
    dense_layers_field="first_k_dense_replace",
    prediction_layers_field="num_nextn_predict_layers",
    fields={
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "attention_bias": False,
        "intermediate_size": None,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    unsaid={
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18_432,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    # of published models; vLLM makes the router by them
    constants={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    gguf=Gguf("deepseek2", fixed={"attention_bias": (False,), "rope_interleave": (True,)}, scaled_rotation=("yarn",)),
)
