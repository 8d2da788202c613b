from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from moedisco_ray.model_map import ModelMap


def backbone_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that all sub-models have in common, by canonical name, which for them is their name in memory."""
    model_map = ModelMap(str(model.config.model_type))
    return {name: p for name, p in model.named_parameters() if model_map.in_common(name, tuple(p.shape))}
