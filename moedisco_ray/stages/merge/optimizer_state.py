"""The merged model's optimizer state, computed from the sub-models' states (`moedisco_ray.models.optimizer_state`).

Experts keep their state. The backbone gets the weighted mean: a gradient over all clusters is the mean of the clusters'
gradients, weighted by their tokens, and its mean square is at most the mean of theirs. In the merged model the router
gives an expert other tokens, with other weights, so its state is only approximate. But Adam's updates do not depend on
the scale of the gradients, and its second moments adapt within dozens of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.models import ModelMap
from moedisco_ray.models.expert_order import Order, Reordered, inverted, source_name
from moedisco_ray.models.optimizer_state import OPTIMIZER_FOLDER, open_optimizer_state, write_optimizer_state


def merge_optimizer_states(
    submodels: Sequence[Path],
    config: Mapping[str, Any],
    weights: Sequence[float],
    directory: Path,
    order: Order | None = None,
) -> bool:
    """Write the merged model's optimizer state.

    Args:
        submodels: Directories of the trained sub-models, in the clusters' order.
        config: `config.json` of the whole MoE.
        weights: gamma_k of the sub-models; they sum to 1.
        directory: Directory of the merged model.
        order: The place of each expert in the merged model; see `build_merged`.

    Returns:
        Whether the state was written. It is not written if a sub-model has no optimizer state, for example because its
        training is unfinished.

    Raises:
        CheckpointError: A sub-model's optimizer state cannot be read.
        OSError: The disk is full or broken.
    """
    states = [state for path in submodels if (state := open_optimizer_state(path / OPTIMIZER_FOLDER)) is not None]
    if len(states) < len(submodels):
        return False
    names = ModelMap(str(config.get("model_type")))
    write_optimizer_state(
        directory / OPTIMIZER_FOLDER,
        lambda kind: _joined([state.tensors[kind] for state in states], weights, names, order or {}),
        min((state.steps for state in states if state.steps), default=0),
        config,
    )
    return True


def _joined(
    parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float], names: ModelMap, order: Order
) -> Iterator[tuple[str, Tensor]]:
    groups = names.experts(parts[0])
    for key in parts[0]:
        role = names.classify(key)
        if role.layer is not None and role.expert is not None:
            for index, part in enumerate(parts):
                place = names.renumbered(key, index * groups[role.layer] + role.expert)
                yield source_name(place, names, order), part[key]
        elif role.expert_axis is not None:
            stacked = {key: torch.cat([part[key] for part in parts], dim=role.expert_axis)}
            yield key, Reordered(stacked, names, inverted(order))[key]
        else:
            # Add up weighted values. Differences from a common tensor, with which the weights are merged, could make a
            # mean of squares negative by rounding.
            mean = sum(weight * part[key].double() for weight, part in zip(weights, parts, strict=True))
            yield key, torch.as_tensor(mean).to(parts[0][key].dtype)
