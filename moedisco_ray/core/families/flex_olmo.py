"""FlexOlmo. Its norms are behind the attention and the experts, as in OLMo-2, its dense relative."""

from moedisco_ray.core.families.declaration import ATTENTION, ATTENTION_BIAS, POST_NORMS, QK_NORM, Attention, Family

FAMILY = Family(
    "flex_olmo",
    num_experts_field="num_experts",
    expert_size_field="intermediate_size",
    backbone=(POST_NORMS, ATTENTION, ATTENTION_BIAS, QK_NORM),
    attention=Attention(biases="qkvo", bias_field="attention_bias", qk_norm="full"),
    norms_in_fp32=True,
    fields={"attention_bias": False},
    dense={"olmo2": {}},
)
