"""Optimizer state between trainings: load it into an optimizer, and save it next to the trained model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import ModelMap, config_values, stored_tensors
from moedisco_ray.models.optimizer_state import KINDS, Kind, open_optimizer_state, write_steps
from moedisco_ray.training.consensus import on_all
from moedisco_ray.training.job import World
from moedisco_ray.training.moments import SCALE, decoded
from moedisco_ray.training.optimizer import RoundingAdamW
from moedisco_ray.training.rounding import local
from moedisco_ray.training.sharded_files import placed_like, read_tensors, write_tensors, zeros_like


def load_optimizer_state(
    directory: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    world: World,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Load stored state into an optimizer that has made no step; each worker reads its own part.

    Every worker must call it.

    Raises:
        CheckpointError: The directory holds no optimizer state, or that of another model.
    """
    on_all(lambda: _load(directory, model, optimizer), world, group)


def _load(directory: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
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
        for parameter in (each for each in trained if kind == "exp_avg" or each not in by_muon):
            moment = torch.empty_like(parameter, requires_grad=False)
            try:
                read_tensors({names[parameter]: moment}, stored.tensors[kind], ModelMap(str(model.config.model_type)))
            except CheckpointError as error:
                raise CheckpointError("optimizer state", str(directory), f"is another model's: {error}") from error
            if isinstance(optimizer, RoundingAdamW):
                optimizer.set_moment(parameter, kind, moment)
            else:
                optimizer.state[parameter][kind] = moment


def save_optimizer_state(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    directory: Path,
    world: World,
    group: dist.ProcessGroup | None = None,
) -> list[Path]:
    """Write an optimizer's state, zeros for weights that were not trained.

    Every worker must call it, and writes its own part.

    Returns:
        The files that this worker has written.

    Raises:
        OSError: The disk is full or broken.
    """
    states: dict[str, dict[str, Any]] = {
        name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()
    }
    steps = max((int(state["step"]) for state in states.values() if state), default=0)
    parameters, config = stored_tensors(model), config_values(model.config)

    def moment(kind: Kind, name: str) -> Tensor:
        stored, scales = states.get(name, {}).get(kind), states.get(name, {}).get(kind + SCALE)
        if stored is None or not local(stored).numel():
            return zeros_like(parameters[name])  # Muon has no second moment
        if scales is None:
            return cast("Tensor", stored)
        value = decoded(local(stored), local(scales))
        if kind == "exp_avg_sq":
            value.square_()
        return placed_like(value.to(parameters[name].dtype), parameters[name])

    written: list[Path] = []
    for kind in KINDS:
        written += write_tensors(
            directory / kind, parameters, config, world, group, values=functools.partial(moment, kind)
        )
    if world.rank == 0:
        written.append(write_steps(directory, steps))
    return written
