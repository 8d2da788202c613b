"""gpt-oss.

It has no dense relative: no dense model has its attention sinks and its activation.
"""

from moedisco_ray.core.families.declaration import ATTENTION, ATTENTION_BIAS, NORMS, Attention, Family, Gguf
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "gpt_oss",
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, r"self_attn\.sinks"),
    router=Router(module="router", normalises="always", bias="bias"),
    attention=Attention(own_head_dim=True, biases="qkvo", bias_field="attention_bias", sinks=True),
    stacks=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    interleaved=True,
    returns_scores=True,
    expert_activations=7,
    norms_in_fp32=True,
    separates_documents=False,
    fields={"attention_bias": True, "sliding_window": 128},
    unsaid={"num_key_value_heads": 8, "head_dim": 64},
    gguf=Gguf("gpt-oss", fixed={"attention_bias": (True,)}, reads_tied=False),
)
