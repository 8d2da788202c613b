"""Muon for the matrices of the layers, AdamW for all other parameters.

Muon (Jordan et al. 2024) updates a matrix by the orthogonal matrix nearest to its momentum, up to a factor, computed
with five Newton-Schulz steps. As in Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982, equation
4), the update is scaled to a root mean square of 0.2, which is typical of AdamW, so both use the same learning rate.
Training needs 12 bytes per parameter instead of 16 in fp32, and 6 instead of 8 in bf16, because the state is one
momentum instead of two moments. The momentum is stored as `exp_avg`, like Adam's first moment, so checkpoints and
merges treat both in the same way.

Each expert's matrices are orthogonalised separately. An expert's gate and up projections share one tensor but are two
matrices.

Axes: E matrices, A rows, B columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.limits import STEP_ELEMENTS
from moedisco_ray.training.rounding import generator, local, round_into

MOMENTUM = 0.95
"""Decay rate of the momentum, Muon's usual value."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step, from Jordan et al."""
_STEPS = 5
_ADAM_RMS = 0.2
"""Typical root mean square of AdamW's updates, relative to the learning rate."""


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon or an adapter trains a parameter: a matrix or stack of a layer.

    Routers, gates of shared experts and convolutions of single channels are none.
    """
    others = ("gate.weight", "gate.hidden_weight", "router.weight", "conv1d.weight", "_bias")
    return parameter.ndim > 1 and ".layers." in name and not name.endswith(others)


class Muon(torch.optim.Optimizer):
    """One optimizer that applies Muon to parameter groups with `halves`, and AdamW to the other groups.

    Args:
        groups: Parameter groups. `halves` is the number of matrices that are stacked in each parameter matrix of the
            group.
        recipe: Learning rate and precision.
        adamw: Function that makes the AdamW of the other groups.
        seed: Seed of stochastic rounding in bf16.
        rank: Rank of this worker.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        recipe: Optimizer,
        adamw: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        seed: int,
        rank: int,
    ) -> None:
        super().__init__(groups, {"lr": recipe.lr, "weight_decay": 0.0, "halves": None})
        self._adamw = adamw([dict(group) for group in self.param_groups if group["halves"] is None])
        self._seed = seed
        self._rank = rank

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # torch overloads it by closure
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        rounding: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            if group["halves"] is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group, rounding)
        # `load_state_dict` replaces the state and the groups of this optimizer, so they are passed to AdamW in each
        # step.
        self._adamw.state = self.state
        given = (group for group in self.param_groups if group["halves"] is None)
        for own, group in zip(self._adamw.param_groups, given, strict=True):
            own.update(params=group["params"], lr=group["lr"])
        self._adamw.step()

    def _update(
        self, parameter: nn.Parameter, group: dict[str, Any], rounding: dict[torch.device, torch.Generator]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        weight, gradient, momentum = local(parameter), local(parameter.grad), local(state["exp_avg"])
        if weight.ndim > 2 and not len(weight):  # more workers than experts: this worker has none
            return
        # One generator for all matrices of a step: with the same bits in each, their rounding errors would be alike.
        if weight.device not in rounding:
            rounding[weight.device] = generator(weight.device, f"muon {self._seed}", int(state["step"]), self._rank)
        # A stack of matrices is sharded between matrices, so every worker has whole matrices and can handle a few at a
        # time.
        at_once = len(weight) if weight.ndim == 2 else max(1, STEP_ELEMENTS // max(1, weight[0].numel()))
        for parts in zip(*(torch.split(each, at_once) for each in (weight, gradient, momentum)), strict=True):
            self._update_part(*parts, parameter=parameter, group=group, rounding=rounding[weight.device])

    @staticmethod
    def _update_part(
        weight: Tensor,
        gradient: Tensor,
        momentum: Tensor,
        *,
        parameter: nn.Parameter,
        group: dict[str, Any],
        rounding: torch.Generator,
    ) -> None:
        momentum_fp32 = momentum.float().lerp_(gradient.float(), 1 - MOMENTUM)
        momentum.copy_(momentum_fp32)
        update = gradient.float().lerp(momentum_fp32, MOMENTUM)  # Nesterov momentum
        if isinstance(parameter, DTensor) and parameter.ndim == 2:
            update = _orthogonal_shard(update, parameter)
        else:
            update = _orthogonal(update, group["halves"])
        decay = 1 - group["lr"] * group["weight_decay"]
        if weight.dtype is torch.float32:
            weight.mul_(decay).add_(update, alpha=-group["lr"])
        else:
            round_into(weight, weight.float().mul_(decay).add_(update, alpha=-group["lr"]), rounding)


def _orthogonal_shard(update: Tensor, parameter: DTensor) -> Tensor:
    """This worker's rows of the orthogonalised update of a sharded matrix, for which all workers' rows are gathered."""
    placed = parameter.device_mesh, parameter.placements
    whole = DTensor.from_local(update, *placed, shape=parameter.shape, stride=parameter.stride()).full_tensor()
    own: DTensor = distribute_tensor(_orthogonal(whole, 1), *placed, src_data_rank=None)
    return own.to_local()


def _orthogonal(update: Tensor, halves: int) -> Tensor:
    """Orthogonalise the update of a matrix, or of a stack of matrices, and scale it to the size of AdamW's updates."""
    matrices_EAB = update.reshape(-1, update.shape[-2] // halves, update.shape[-1])
    scale = _ADAM_RMS * max(matrices_EAB.shape[1:]) ** 0.5
    return orthogonalised(matrices_EAB).mul_(scale).view_as(update)


def orthogonalised(matrices_EAB: Tensor) -> Tensor:
    """Matrices with the same singular vectors as the given ones, and singular values of about 1 (0.7 to 1.2).

    The arithmetic is bf16 on a GPU, which is accurate enough for Newton-Schulz steps, and fp32 on a CPU.
    """
    x_EAB = matrices_EAB.to(torch.bfloat16 if matrices_EAB.is_cuda else torch.float32)
    tall = x_EAB.shape[1] > x_EAB.shape[2]
    if tall:
        x_EAB = x_EAB.mT
    x_EAB = x_EAB / x_EAB.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram_EAA = x_EAB @ x_EAB.mT
        x_EAB = a * x_EAB + (b * gram_EAA + c * gram_EAA @ gram_EAA) @ x_EAB
    return (x_EAB.mT if tall else x_EAB).float()
