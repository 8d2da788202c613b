"""Choose the recipe for merging backbones by the merged model's loss on held-out text."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.models import ModelMap, load_model, model_tensors, specialise, write_checkpoint
from moedisco_ray.stages.merge.backbone import Recipe
from moedisco_ray.stages.merge.tensors import merge, merged_backbone

Loss = Callable[[PreTrainedModel], float]
"""Function that returns a model's loss on held-out text (nats per token)."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe, and the held-out loss of its merged and calibrated model."""

    recipe: Recipe
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """`rule`, `scale` and `loss`, for `merge.json`."""
        return {**self.recipe.to_dict(), "loss": self.loss}


def measure_recipes(
    submodels: Sequence[Mapping[str, Tensor]], start: Mapping[str, Tensor], config: Mapping[str, Any], recipes: Sequence[Recipe], *,
    scratch: Path, calibrate: Callable[[PreTrainedModel], object], loss: Loss, device: str,
) -> list[Candidate]:
    """The held-out loss of each recipe's merged model.

    The first recipe's merged model is written to `scratch`. For each recipe it is loaded from there, and its backbone is replaced.

    Args:
        submodels: Canonical tensors of each sub-model.
        start: Canonical tensors that the sub-models started from.
        config: `config.json` of the whole MoE.
        recipes: The recipes to compare.
        scratch: A directory for the model; it is removed afterwards.
        calibrate: Sets a merged model's routers, in place.
        loss: Measures a merged model.
        device: Device that the model runs on.
    """
    model_map = ModelMap(str(config.get("model_type")))
    write_checkpoint(scratch, merge(submodels, start, model_map, recipes[0]), config)
    candidates = []
    for recipe in recipes:
        model = load_model(scratch).to(device)
        tensors = dict(model_tensors(model))
        with torch.no_grad():
            for key, tensor in merged_backbone(submodels, start, model_map, recipe):
                tensors[key].copy_(tensor)
        calibrate(specialise(model))
        candidates.append(Candidate(recipe, loss(model)))
    shutil.rmtree(scratch)
    return candidates


def best(candidates: Sequence[Candidate]) -> Recipe:
    """The recipe with the lowest loss; among equals, the first."""
    return min(candidates, key=lambda candidate: candidate.loss).recipe
