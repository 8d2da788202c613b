"""A training's side of `moedisco_ray.models.optimizer_state`: its optimizer begins with another's, and leaves its own behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import ModelMap, canonical_state, config_values, memory_state
from moedisco_ray.models.optimizer_state import KINDS, Kind, open_moments, write_moments
from moedisco_ray.training.job import World


def take_up(directory: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Let an optimizer that has made no step begin with stored moments. Every worker must call it; rank 0 alone reads tensors.

    Raises:
        CheckpointError: There are none, or they are another model's.
    """
    found = open_moments(directory)
    if found is None:
        raise CheckpointError("moments", str(directory), "there are none")
    names = {parameter: name for name, parameter in model.named_parameters()}
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in learning:
        # On the device: a fused AdamW asks for that.
        optimizer.state[parameter]["step"] = torch.tensor(float(found.steps), device=parameter.device)
    for kind in KINDS:
        whole = memory_state(found.tensors[kind], ModelMap(str(model.config.model_type))) if world.rank == 0 else {}
        for parameter in learning:
            optimizer.state[parameter][kind] = _placed(whole.get(names[parameter]), parameter, names[parameter], world)


def lay_down(model: PreTrainedModel, optimizer: torch.optim.Optimizer, directory: Path, world: World) -> None:
    """Write an optimizer's moments, zero where a weight did not learn. Every worker must call it; rank 0 alone writes.

    Raises:
        OSError: The disk is full or broken.
    """
    states: dict[str, dict[str, Any]] = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    steps = max((int(state["step"]) for state in states.values() if state), default=0)

    def whole(kind: Kind) -> dict[str, Tensor]:
        return {
            name: _whole(states[name][kind] if states[name] else torch.zeros_like(parameter))
            for name, parameter in model.named_parameters()}

    names, config = ModelMap(str(model.config.model_type)), config_values(model.config)
    if world.rank == 0:
        write_moments(directory, lambda kind: canonical_state(whole(kind), names).items(), steps, config)
    else:
        for kind in KINDS:
            whole(kind)


def _placed(tensor: Tensor | None, parameter: torch.nn.Parameter, name: str, world: World) -> Tensor:
    """A moment as the parameter is: in its type, on its device, cut as it is over the workers."""
    if world.rank == 0 and (tensor is None or tensor.shape != parameter.shape):
        raise CheckpointError("moments", name, f"has the shape {None if tensor is None else list(tensor.shape)}, its weight "
                              f"{list(parameter.shape)}: another model's")
    full = torch.empty(parameter.shape) if tensor is None else tensor
    full = full.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    return full


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()
