"""OLMoE. It has no dense relative, because OLMo places its norms differently."""

from moedisco_ray.core.families.declaration import ATTENTION, ATTENTION_BIAS, NORMS, QK_NORM, Attention, Family, Gguf

FAMILY = Family(
    "olmoe",
    num_experts_field="num_experts",
    expert_size_field="intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, QK_NORM),
    attention=Attention(biases="qkvo", bias_field="attention_bias", qk_norm="full"),
    fields={"attention_bias": False},
    gguf=Gguf(
        "olmoe",
        fixed={"norm_topk_prob": (False,), "attention_bias": (False,), "clip_qkv": (None,)},
        reads_tied=False,
        same={"num_key_value_heads": "num_attention_heads"},
    ),
)
