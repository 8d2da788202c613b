"""Optimizer state between trainings: load it into an optimizer, and save it next to the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import ModelMap, canonical_state, config_values, memory_state
from moedisco_ray.models.optimizer_state import KINDS, Kind, open_optimizer_state, write_optimizer_state
from moedisco_ray.training.job import World
from moedisco_ray.training.moments import SCALE, decoded
from moedisco_ray.training.optimizer import RoundingAdamW


def load_optimizer_state(directory: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Load stored state into an optimizer that has made no step. Every worker must call it; only rank 0 reads tensors.

    Raises:
        CheckpointError: The directory holds no optimizer state, or that of another model.
    """
    stored = open_optimizer_state(directory)
    if stored is None:
        raise CheckpointError("optimizer state", str(directory), "does not exist; train the earlier model again")
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_muon = {parameter for group in optimizer.param_groups if group.get("halves") for parameter in group["params"]}
    for parameter in trained:
        # A fused AdamW needs the step on the device.
        optimizer.state[parameter]["step"] = torch.tensor(float(stored.steps), device=parameter.device)
    for kind in KINDS:
        tensors = memory_state(stored.tensors[kind], ModelMap(str(model.config.model_type))) if world.rank == 0 else {}
        for parameter in (each for each in trained if kind == "exp_avg" or each not in by_muon):
            moment = _placed(tensors.get(names[parameter]), parameter, names[parameter], world)
            if isinstance(optimizer, RoundingAdamW):
                optimizer.set_moment(parameter, kind, moment)
            else:
                optimizer.state[parameter][kind] = moment


def save_optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer, directory: Path, world: World) -> None:
    """Write an optimizer's state, with zeros for weights that were not trained. Every worker must call it; only rank 0 writes.

    Raises:
        OSError: The disk is full or broken.
    """
    states: dict[str, dict[str, Any]] = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    steps = max((int(state["step"]) for state in states.values() if state), default=0)

    def moment(name: str, parameter: Tensor, kind: Kind) -> Tensor:
        if kind not in states[name]:
            return _gathered(torch.zeros_like(parameter))    # Muon has no second moment
        stored, scales = _gathered(states[name][kind]), states[name].get(kind + SCALE)
        if scales is None:
            return stored
        value = decoded(stored, _gathered(scales))
        return (value if kind == "exp_avg" else value.square_()).to(parameter.dtype)

    def gathered(kind: Kind) -> dict[str, Tensor]:
        return {name: moment(name, parameter, kind) for name, parameter in model.named_parameters()}

    names, config = ModelMap(str(model.config.model_type)), config_values(model.config)
    if world.rank == 0:
        write_optimizer_state(directory, lambda kind: canonical_state(gathered(kind), names).items(), steps, config)
    else:
        for kind in KINDS:
            gathered(kind)


def _placed(tensor: Tensor | None, parameter: torch.nn.Parameter, name: str, world: World) -> Tensor:
    """A state tensor with the dtype, the device and the sharding of its parameter."""
    if world.rank == 0 and (tensor is None or tensor.shape != parameter.shape):
        shape = None if tensor is None else list(tensor.shape)
        raise CheckpointError("optimizer state", name, f"has shape {shape}, its weight {list(parameter.shape)}: another model's")
    full = torch.empty(parameter.shape) if tensor is None else tensor
    full = full.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    return full


def _gathered(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()
