"""ERNIE 4.5 for text, such as ERNIE-4.5-21B-A3B. Its MoE layers follow each other, up to the last layer."""

from moedisco_ray.core.families.declaration import ATTENTION, DENSE_MLP, NORMS, Attention, Family, Gguf, SharedExpert
from moedisco_ray.core.families.router import Router

_CORRECTION = "moe_statics.e_score_correction_bias"

FAMILY = Family(
    "ernie4_5_moe",
    num_experts_field="moe_num_experts",
    expert_size_field="moe_intermediate_size",
    backbone=(NORMS, ATTENTION, DENSE_MLP),
    router=Router(
        normalises="always",
        correction=_CORRECTION,
        correction_axis=1,
        top_k_field="moe_k",
        in_fp32=True,
        without_autocast=True,
    ),
    attention=Attention(own_head_dim=True, own_rotation=True),
    shared=SharedExpert("shared_experts", count_field="moe_num_shared_experts"),
    renamed={f"gate.{_CORRECTION}": _CORRECTION},
    dense_layers_field="moe_layer_start_index",
    last_layer_field="moe_layer_end_index",
    prediction_layers_field="num_nextn_predict_layers",
    prediction_prefix="model.mtp_",
    fields={
        "intermediate_size": None,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_num_shared_experts": 1,
        "moe_norm_min": 1e-12,
        "use_bias": False,
    },
    unsaid={
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "intermediate_size": 12_288,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 2,
    },
    choices={"moe_layer_interval": (1,), "moe_norm_min": (1e-12,), "use_bias": (False,)},
    dense={"ernie4_5": {}},
    gguf=Gguf("ernie4_5-moe", needs_interval=True),
)
