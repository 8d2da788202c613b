"""Granite 3.0 and 3.1 MoE, and PowerMoE. New models have the factors of Granite 3.0's, which suit heads of size 64."""

from moedisco_ray.core.families.declaration import ATTENTION, ATTENTION_BIAS, NORMS, Attention, Family, Gguf
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "granitemoe",
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    block="block_sparse_moe",
    stacks=("gate_up_proj", "down_proj"),
    renamed={
        "router.weight": "router.layer.weight",
        "experts.gate_up_proj": "input_linear.weight",
        "experts.down_proj": "output_linear.weight",
    },
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS),
    router=Router(module="router", normalises="always"),
    attention=Attention(biases="qkvo", bias_field="attention_bias"),
    fields={
        "attention_bias": False,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    },
    unsaid={
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    dense={"granite": {}},
    embedding_factor="embedding_multiplier",
    logits_divisor="logits_scaling",
    gguf=Gguf(
        "granitemoe",
        fixed={"attention_bias": (False,)},
        in_pairs=True,
        scales={
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
)
