"""Mixtral."""

from moedisco_ray.core.families.declaration import ATTENTION, NORMS, Attention, Family, Gguf
from moedisco_ray.core.families.router import Router

FAMILY = Family(
    "mixtral",
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    block="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    backbone=(NORMS, ATTENTION),
    router=Router(normalises="always", weights_in_fp32=True),
    attention=Attention(own_head_dim=True),
    unsaid={"num_key_value_heads": 8},
    dense={"mistral": {}, "llama": {}},
    gguf=Gguf("llama", fixed={"sliding_window": (None,)}, in_pairs=True, scaled_rotation=("linear", "yarn", "llama3")),
)
