from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from moedisco_ray.models import ModelMap, Role


def backbone_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that sub-models have in common, which the merge averages: all but experts and routers.

    Returns:
        By canonical name, which for these is their name in memory.
    """
    names = ModelMap(str(model.config.model_type))
    common = (Role.BACKBONE, Role.SHARED_EXPERT)
    return {name: p for name, p in model.named_parameters() if names.role_in_memory(name, tuple(p.shape)) in common}
