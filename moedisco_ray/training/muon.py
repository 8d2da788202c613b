"""Muon for the matrices of the layers, AdamW for all other parameters.

Muon (Jordan et al. 2024) updates a matrix by the orthogonal matrix nearest to its momentum, up to a factor, computed
with five Newton-Schulz steps. As in Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982, equation
4), the update is scaled to a root mean square of 0.2, which is typical of AdamW, so both use the same learning rate.
Training needs 12 bytes per parameter instead of 16 in fp32, and 6 instead of 8 in bf16, because the state is one
momentum instead of two moments. The momentum is stored as `exp_avg`, like Adam's first moment, so checkpoints and
merges treat both in the same way.

Each expert's matrices are orthogonalised separately. An expert's gate and up projections share one tensor but are two
matrices. The workers of a gang share the matrices (`training.shared_matrices`).

Axes: E matrices, A rows, B columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.limits import NEWTON_SCHULZ_STEPS, STEP_ELEMENTS
from moedisco_ray.training.rounding import generator, local, round_into
from moedisco_ray.training.shared_matrices import orthogonal_rows, sharing_group, windows

MOMENTUM = 0.95
"""Decay rate of the momentum, Muon's usual value."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step, from Jordan et al."""
_ADAM_RMS = 0.2
"""Typical root mean square of AdamW's updates, relative to the learning rate."""
_ROUTERS = [page.router for page in DECLARATIONS.values()]
_NO_MATRICES = (
    "shared_expert_gate.weight",
    "conv1d.weight",
    "_bias",
    *{each.in_block(name) for each in _ROUTERS for name in (*each.tensors, *filter(None, [each.hidden]))},
)
"""Ends of the names of parameters that neither Muon nor adapters train."""


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon or an adapter trains a parameter: a matrix or stack of a layer.

    Routers, gates of shared experts and convolutions of single channels are none.
    """
    return parameter.ndim > 1 and ".layers." in name and not name.endswith(_NO_MATRICES)


class Muon(torch.optim.Optimizer):
    """One optimizer that applies Muon to parameter groups with `halves`, and AdamW to the other groups.

    Args:
        groups: Parameter groups. `halves` is the number of matrices that are stacked in each parameter matrix of the
            group.
        recipe: Learning rate and precision.
        adamw: Function that makes the AdamW of the other groups.
        seed: Seed of stochastic rounding in bf16.
        rank: Rank of this worker.

    Attributes:
        adamw: The AdamW of the other groups; it reads and changes the state of this optimizer.
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
        self.adamw = adamw([dict(group) for group in self.param_groups if group["halves"] is None])
        self._seed = seed
        self._rank = rank

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        rounding: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            if group["halves"] is not None:
                for run in windows([parameter for parameter in group["params"] if parameter.grad is not None]):
                    self._update_run(run, group, rounding)
        self.pass_to_adamw()
        self.adamw.step()

    def pass_to_adamw(self) -> None:
        """Pass state and groups to AdamW: before each step, because `load_state_dict` replaces those of this one."""
        self.adamw.state = self.state
        given = (group for group in self.param_groups if group["halves"] is None)
        for own, group in zip(self.adamw.param_groups, given, strict=True):
            own.update(params=group["params"], lr=group["lr"])

    def add_state(self, parameter: nn.Parameter) -> None:
        """Give a matrix the state of a training that has made no step, unless it has a state."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)

    def rounding(self, device: torch.device, step: int) -> torch.Generator:
        """Generator of the random bits of a step's matrices."""
        return generator(device, f"muon {self._seed}", step, self._rank)

    def _update_run(
        self, parameters: Sequence[Any], group: dict[str, Any], rounding: dict[torch.device, torch.Generator]
    ) -> None:
        """Update parameters in their order, after the updates of shared matrices are orthogonalised."""
        for parameter in parameters:
            self.add_state(parameter)
        torch._foreach_add_([self.state[each]["step"] for each in parameters], 1)
        shared = [parameter for parameter in parameters if sharing_group(parameter) is not None]
        updates = [_nesterov(local(each.grad), local(self.state[each]["exp_avg"])) for each in shared]
        orthogonal = iter(orthogonal_rows(shared, updates, functools.partial(_orthogonal, halves=1)))
        del updates
        for parameter in parameters:
            weight, state = local(parameter), self.state[parameter]
            # One generator for all matrices of a step: with the same bits in each, their rounding errors would be
            # alike. The CPU waits for a GPU to learn the number of the step, and fp32 needs no rounding.
            if weight.dtype is not torch.float32 and weight.device not in rounding:
                rounding[weight.device] = self.rounding(weight.device, int(state["step"]))
            source = rounding.get(weight.device)
            if sharing_group(parameter) is not None:
                _apply(weight, next(orthogonal), group, source)
                continue
            if weight.ndim > 2 and not len(weight):  # more workers than experts: this worker has none
                continue
            # A stack of matrices is sharded between matrices, so every worker has whole matrices and can handle a few
            # at a time.
            whole = (weight, local(parameter.grad), local(state["exp_avg"]))
            for parts in zip(*(torch.split(each, rows_at_once(weight)) for each in whole), strict=True):
                self.update_part(*parts, group=group, rounding=source)

    @staticmethod
    def update_part(
        weight: Tensor, gradient: Tensor, momentum: Tensor, *, group: dict[str, Any], rounding: torch.Generator | None
    ) -> None:
        """Update whole matrices in place.

        Args:
            weight: A matrix, or some matrices of a stack.
            gradient: Its gradient.
            momentum: Its momentum.
            group: The parameter's group, with the settings.
            rounding: Generator of the random bits of rounding, which fp32 does not need.
        """
        _apply(weight, _orthogonal(_nesterov(gradient, momentum), group["halves"]), group, rounding)


def _nesterov(gradient: Tensor, momentum: Tensor) -> Tensor:
    """Add a gradient to a momentum, in place, and return the Nesterov momentum in fp32."""
    momentum_fp32 = momentum.float().lerp_(gradient.float(), 1 - MOMENTUM)
    momentum.copy_(momentum_fp32)
    return gradient.float().lerp(momentum_fp32, MOMENTUM)


def _apply(weight: Tensor, update: Tensor, group: dict[str, Any], rounding: torch.Generator | None) -> None:
    decay = 1 - group["lr"] * group["weight_decay"]
    if rounding is None or weight.dtype is torch.float32:
        weight.mul_(decay).add_(update, alpha=-group["lr"])
    else:
        round_into(weight, weight.float().mul_(decay).add_(update, alpha=-group["lr"]), rounding)


def rows_at_once(weight: Tensor) -> int:
    """Number of rows that an update handles at once: all rows of a matrix, and a few matrices of a stack."""
    return len(weight) if weight.ndim == 2 else max(1, STEP_ELEMENTS // max(1, weight[0].numel()))


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
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_EAA = x_EAB @ x_EAB.mT
        x_EAB = a * x_EAB + (b * gram_EAA + c * gram_EAA @ gram_EAA) @ x_EAB
    return (x_EAB.mT if tall else x_EAB).float()
