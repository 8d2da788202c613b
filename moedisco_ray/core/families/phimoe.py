"""Phi-3.5-MoE. Its router is SparseMixer, which selects two experts one after the other; most of their weights are 1.

* transformers samples both experts in training. Here the router runs as it does at inference, so that a training can be
  resumed exactly. The loss of the text has a gradient in a router only where two logits are nearly equal; the
  load-balance loss trains it for every token.
* New models have the biases of Phi-3.5-MoE. vLLM 0.32 takes them for granted, but leaves out that of the head: it
  computes only models with `lm_head_bias: false`.
* A sub-model with one expert runs it with the weight 1; transformers cannot run such a model.
* An MoE of copies of one expert would not compute what the expert does, because two weights sum to more than 1 or to
  less.
* llama.cpp knows the family, but normalises by the root mean square without subtracting the mean, and weights the
  experts by a softmax over all of them that is scaled to sum to 1.
"""

from moedisco_ray.core.families.declaration import ATTENTION, ATTENTION_BIAS, Attention, Family
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "phimoe",
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    architecture="PhiMoEForCausalLM",
    block="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    renamed={"router.weight": "gate.weight"},
    backbone=(r"(input|post_attention)_layernorm\.(weight|bias)", ATTENTION, ATTENTION_BIAS),
    outside=("model.norm.bias", "lm_head.bias"),
    router=Router(
        module="router",
        scores="sparse_mixer",
        normalises="never",
        only_top_k=2,
        jitter_field="router_jitter_noise",
        least_in_group=2,
    ),
    attention=Attention(own_head_dim=True, biases="qkvo", bias_field="attention_bias"),
    layer_norms=True,
    head_bias_field="lm_head_bias",
    fields={"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01},
    not_in_gguf="has RMSNorms in place of its norms, and weights its experts by a softmax that is scaled to sum to 1",
    unsaid={"num_key_value_heads": 8, "attention_bias": False, "lm_head_bias": False},
    scalings={"longrope": ("original_max_position_embeddings", "short_mscale", "long_mscale")},
)
