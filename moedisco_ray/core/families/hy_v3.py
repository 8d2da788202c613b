"""Hunyuan 3 (Hy3). Its attention is that of Qwen3, and its router that of MiniMax-M2, with a factor on the weights."""

from moedisco_ray.core.families.declaration import (
    ATTENTION,
    ATTENTION_BIAS,
    DENSE_MLP,
    NORMS,
    QK_NORM,
    Attention,
    Family,
    SharedExpert,
)
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "hy_v3",
    num_experts_field="num_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, QK_NORM, DENSE_MLP),
    router=Router(
        scores="sigmoid",
        normalises="always",
        correction="e_score_correction_bias",
        correction_of_block=True,
        scaling_field="router_scaling_factor",
        in_fp32=True,
        weights_in_fp32=True,
    ),
    renamed={
        "gate.weight": "router.gate.weight",
        "e_score_correction_bias": "expert_bias",
        **{f"shared_experts.{part}_proj.weight": f"shared_mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    },
    attention=Attention(own_head_dim=True, biases="qkvo", bias_field="attention_bias", qk_norm="head"),
    shared=SharedExpert("shared_experts", stored="shared_mlp", count_field="num_shared_experts"),
    dense_layers_field="first_k_dense_replace",
    dense_layers_list="mlp_layer_types",
    prediction_layers_field="num_nextn_predict_layers",
    fields={
        "attention_bias": False,
        "intermediate_size": None,
        "first_k_dense_replace": 0,
        "num_shared_experts": 1,
        "router_scaling_factor": 1.0,
        "enable_moe_fp32_combine": True,
    },
    unsaid={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 13_312,
        "first_k_dense_replace": 1,
        "router_scaling_factor": 2.826,
    },
    in_transformers_4=False,
)
