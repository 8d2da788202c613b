"""Qwen3.5-MoE and Qwen3.6-MoE without their part for images (`qwen3_5_moe`), which is left out.

Dense Qwen3.5 is a start too, as `qwen3_5` or without the part for images.

Layers are those of Qwen3-Next.
"""

import dataclasses

from moedisco_ray.core.families import qwen3_next
from moedisco_ray.core.families.composite import Composite
from moedisco_ray.core.families.declaration import ATTENTION, ATTENTION_BIAS, NORMS, QK_NORM, Gguf
from moedisco_ray.core.families.recurrence import Recurrence
from moedisco_ray.core.families.router import Router

FAMILY = dataclasses.replace(
    qwen3_next.FAMILY,
    name="qwen3_5_moe_text",
    backbone=(NORMS, ATTENTION, ATTENTION_BIAS, QK_NORM),
    router=Router(normalises="always"),
    recurrence=Recurrence(projections=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
    constants={},
    own_tokenizer=True,
    composite=Composite(
        {"qwen3_5_moe": "qwen3_5_moe_text", "qwen3_5": "qwen3_5_text"},
        prefix="model.language_model.",
        others=("model.visual.",),
    ),
    dense={"qwen3_5_text": {}},
    gguf=Gguf(
        "qwen35moe",
        fixed={"attention_bias": (False,)},
        same={"linear_value_head_dim": "linear_key_head_dim"},
        tiles_values=True,
        has_sections=True,
    ),
    in_transformers_4=False,
)
