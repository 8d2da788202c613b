"""MiniMax-M2. Queries and keys are normalised over all heads, and half of each head is rotated."""

from moedisco_ray.core.families.declaration import ATTENTION, NORMS, QK_NORM, Attention, Family, Gguf
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "minimax_m2",
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    block="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    backbone=(NORMS, ATTENTION, QK_NORM),
    router=Router(
        scores="sigmoid",
        normalises="always",
        weights_in_fp32=True,
        correction="e_score_correction_bias",
        correction_of_block=True,
    ),
    attention=Attention(partial_rotation=True, own_head_dim=True, qk_norm="full"),
    prediction_layers_field="num_mtp_modules",
    fields={"partial_rotary_factor": 0.5},
    unsaid={"num_key_value_heads": 8, "head_dim": 128},
    # of published models; vLLM makes the router by them
    constants={"scoring_func": "sigmoid", "use_routing_bias": True},
    gguf=Gguf("minimax-m2"),
    in_transformers_4=False,
)
