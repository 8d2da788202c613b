"""DeepSeek-V2, DeepSeek-V2-Lite and DeepSeek-Coder-V2.

A sub-model has fewer experts, so its router cannot keep three settings of the whole model:

* Router weights are a softmax over all experts and are never normalised; transformers reads no `norm_topk_prob` here.
  In a sub-model the softmax covers the sub-model's experts only, so their weights are larger. The merge rescales the
  experts.
* `num_experts_per_tok` is at most the number of the sub-model's experts.
* With `topk_method: group_limited_greedy`, `topk_group` is at most the number of the sub-model's groups. A sub-model
  with a part of one group has no limit.
"""

import dataclasses

from moedisco_ray.core.families import deepseek_v3
from moedisco_ray.core.families.declaration import Gguf
from moedisco_ray.core.families.router import Router

FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    name="deepseek_v2",
    router=Router(
        normalises="never",
        scaling_field="routed_scaling_factor",
        limits_groups=True,
        limit_field=("topk_method", "group_limited_greedy"),
        in_fp32=True,
        weights_in_fp32=True,
    ),
    prediction_layers_field=None,
    constants={"scoring_func": "softmax"},  # of published models; transformers has no such field, vLLM reads it
    fields={**deepseek_v3.FAMILY.fields, "topk_method": "greedy"},
    unsaid={
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 11_008,
        "n_shared_experts": 2,
    },
    choices={"topk_method": ("greedy", "group_limited_greedy")},
    gguf=Gguf("deepseek2", fixed={"attention_bias": (False,), "topk_method": ("greedy",)}, scaled_rotation=("yarn",)),
)
