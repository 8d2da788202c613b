"""Qwen3-Next.

Three of four layers are Gated DeltaNet (arXiv 2412.06464), which has a recurrent state instead of attention.

Norms multiply by one plus their weight, except the norm of the recurrent layers' output.
"""

from moedisco_ray.core.families.declaration import (
    ATTENTION,
    ATTENTION_BIAS,
    DENSE_MLP,
    NORMS,
    QK_NORM,
    Attention,
    Family,
    Gguf,
    SharedExpert,
)
from moedisco_ray.core.families.recurrence import Recurrence

FAMILY = Family(
    "qwen3_next",
    num_experts_field="num_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, QK_NORM, DENSE_MLP),
    attention=Attention(
        partial_rotation=True,
        own_head_dim=True,
        biases="qkvo",
        bias_field="attention_bias",
        qk_norm="head",
        output_gate=True,
    ),
    recurrence=Recurrence(projections=("in_proj_qkvz", "in_proj_ba"), fused=True),
    shared=SharedExpert("shared_expert", gate="shared_expert_gate", size_field="shared_expert_intermediate_size"),
    norms_in_fp32=True,
    prediction_layers_field="mtp_num_hidden_layers",
    prediction_prefix="mtp.",
    initial={"linear_attn.norm.weight": "ones", "norm.weight": "zeros", "dt_bias": "ones", "A_log": "log_uniform"},
    fields={
        "attention_bias": False,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    },
    unsaid={
        "num_key_value_heads": 2,
        "head_dim": 256,
        "shared_expert_intermediate_size": 512,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    constants={"decoder_sparse_step": 1, "mlp_only_layers": []},  # every layer is an MoE layer
    gguf=Gguf(
        "qwen3next",
        fixed={"norm_topk_prob": (True,), "attention_bias": (False,)},
        same={"linear_value_head_dim": "linear_key_head_dim"},
    ),
)
