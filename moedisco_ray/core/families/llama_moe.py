"""LLaMA-MoE v1, which is LLaMA 2 with its MLPs divided into experts.

transformers has no such model: see `moedisco_ray.models.llama_moe`. The router's noise in training is left out, and its
weights are kept as they are.
"""

from moedisco_ray.core.families.declaration import ATTENTION, ATTENTION_BIAS, NORMS, Attention, Family
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "llama_moe",
    num_experts_field="num_experts",
    expert_size_field="moe_intermediate_size",
    summed_size_field="intermediate_size",
    expert_name="calculator.experts.{projection}.{expert}",
    projections=("weight_gate", "weight_up", "weight_down"),
    renamed={
        "gate.hidden_weight": "gate.gate_network.0.weight",
        "gate.weight": "gate.gate_network.2.weight",
        "gate.noise_weight": "gate.weight_noise.weight",
    },
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, r"mlp\.gate\.gate_network\.0\.weight"),
    router=Router(
        normalises="always",
        hidden="hidden_weight",
        hidden_size_field="gate_hidden_size",
        noise="noise_weight",
        top_k_field="num_selects",
        scaling_field="score_scale_factor",
    ),
    attention=Attention(biases="qkvo", bias_field="attention_bias"),
    fields={
        "score_scale_factor": 1.0,
        "gate_hidden_size": None,
        "gate_type": "TopKBalancedNoisyGate",
        "gate_network": "mlp",
        "gate_use_softmax": True,
        "gate_add_noise": True,
        "calculator_type": "UniversalCalculator",
        "multiply_gate_scores": True,
        "add_weight_norm": False,
        "attention_bias": False,
    },
    choices={
        "gate_type": ("TopKBalancedNoisyGate",),
        "gate_network": ("mlp",),
        "gate_use_softmax": (True,),
        "gate_add_noise": (True,),
        "calculator_type": ("UniversalCalculator",),
        "multiply_gate_scores": (True,),
        "add_weight_norm": (False,),
    },
    dense={"llama": {}},
    initial={"weight_noise.weight": "zeros"},
    not_in_gguf="has only routers of one layer",
    derived=(".rotary_emb.inv_freq",),
    module="moedisco_ray.models",
    in_transformers_4=False,
)
