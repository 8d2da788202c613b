"""GLM-4.7-Flash. Its layers are those of DeepSeek-V3."""

import dataclasses

from moedisco_ray.core.families import deepseek_v3

FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    name="glm4_moe_lite",
    dense_layers_list="mlp_layer_types",
    constants={},
    unsaid={
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "intermediate_size": 10_240,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
    },
    in_transformers_4=False,
)
