"""Sarvam-105B. Its layers are those of DeepSeek-V3."""

import dataclasses

from moedisco_ray.core.families import deepseek_v3

FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    name="sarvam_mla",
    constants={},
    unsaid={
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 16_384,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
    },
    in_transformers_4=False,
)
