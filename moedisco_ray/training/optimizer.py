"""The learning rate schedule, and the optimizer: AdamW (Loshchilov and Hutter 2019, algorithm 2), alone or next to Muon."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.config import Optimizer
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.muon import Muon, is_matrix
from moedisco_ray.training.rounding import generator, local, round_into

BETAS = (0.9, 0.95)
"""Decay rates of Adam's moments, usual for language models; equal in all trainings, so that one can continue another's state."""
LARGEST_NORM = 1.0
"""Maximum norm of a gradient, to which larger ones are clipped; the usual value for language models."""
DECAY = 0.2
"""Share of the steps in which the schedule `wsd` decays the learning rate; its paper finds 10 to 20 % sufficient."""
STEP_ELEMENTS = 2**24
"""Maximum elements that `RoundingAdamW` updates at once (320 MiB of fp32 copies). A whole embedding would need several GB."""
_FINAL_SHARE = 0.1
"""Final learning rate of the cosine, as a share of the peak."""


def make_optimizer(model: PreTrainedModel, job: TrainJob, world: World) -> torch.optim.Optimizer:
    """Make the job's optimizer for all trainable parameters; norms and biases (tensors with one axis) get no weight decay."""
    groups: dict[tuple[int | None, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            halves = 2 if name.endswith("gate_up_proj") else 1
            by_muon = job.optimizer.name == "muon" and is_matrix(name, parameter)
            groups[halves if by_muon else None, parameter.ndim > 1].append(parameter)
    decay = job.optimizer.weight_decay
    made = [
        {"params": parameters, "weight_decay": decay if decays else 0.0, **({"halves": halves} if halves else {})}
        for (halves, decays), parameters in sorted(groups.items(), key=lambda group: (group[0][0] or 0, not group[0][1]))]
    make_adamw = functools.partial(adamw, recipe=job.optimizer, seed=job.seed, rank=world.rank)
    return Muon(made, job.optimizer, make_adamw, job.seed, world.rank) if job.optimizer.name == "muon" else make_adamw(made)


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """The learning rate of a step: linear warm-up, then constant or a cosine down to a tenth.

    With w = warmup * steps rounded up: lr (step + 1) / w while step < w. The cosine starts at step s, and the rate is lr until
    then. For `cosine`, s = w. For `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM, arXiv 2404.06395), s is the later of w
    and steps - 0.2 steps, with 0.2 steps rounded up. With t = (step - s) / (steps - 1 - s) the rate is
    lr (0.1 + 0.9 (1 + cos(pi t)) / 2), after Loshchilov and Hutter 2017, SGDR, equation 5.

    Args:
        step: Step, counted from 0.
        steps: Steps of the whole training.
        optimizer: The recipe: `lr`, `schedule` and `warmup` are read.
    """
    decay_start = warmup = math.ceil(optimizer.warmup * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if optimizer.schedule == "wsd":
        decay_start = max(warmup, steps - math.ceil(DECAY * steps))
    if optimizer.schedule == "constant" or step < decay_start:
        return optimizer.lr
    progress = min(1.0, (step - decay_start) / max(1, steps - 1 - decay_start))
    return optimizer.lr * (_FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw(groups: Iterable[dict[str, Any]], recipe: Optimizer, seed: int, rank: int = 0) -> torch.optim.Optimizer:
    """AdamW with weights and state in the dtype of the recipe: fp32, or bf16 with stochastic rounding.

    Args:
        groups: Parameter groups in torch's format.
        recipe: Learning rate and precision.
        seed: Seed of stochastic rounding.
        rank: Rank of this worker; workers round their parts of a tensor independently.
    """
    if recipe.state == "fp32":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, fused=True)
    return RoundingAdamW(groups, lr=recipe.lr, betas=BETAS, seed=seed, rank=rank)


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW with weights, gradients and both moments in bf16: 8 bytes per parameter.

    A second moment with a beta near 1 would never change if it were rounded to nearest. So weights and second moments are computed
    in fp32 and rounded at random (`training.rounding`). The first moment changes far more per step and is rounded to nearest.

    Args:
        params: bf16 parameters, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay.
        seed: Seed of the rounding.
        rank: Rank of this worker.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = BETAS, eps: float = 1e-8,
        weight_decay: float = 0.0, seed: int = 0, rank: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed
        self._rank = rank

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # torch overloads it by closure
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("RoundingAdamW takes no closure")
        generators: dict[tuple[torch.device, int], torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                step = int(state["step"])
                key = (parameter.device, step)
                if key not in generators:
                    generators[key] = generator(parameter.device, self._seed, step, self._rank)
                self._update(group, parameter, state, step, generators[key])

    @staticmethod
    def _update(
        group: dict[str, Any], parameter: Tensor, state: dict[str, Any], step: int, generator: torch.Generator,
    ) -> None:
        tensors = (local(each) for each in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        gradient = local(parameter.grad).reshape(-1)
        weight, moment, square = (each.view(-1) for each in tensors)
        split = (torch.split(each, STEP_ELEMENTS) for each in (weight, gradient, moment, square))
        for parts in zip(*split, strict=True):
            _update_part(group, *parts, step=step, generator=generator)


def _update_part(
    group: dict[str, Any], weight: Tensor, gradient: Tensor, moment: Tensor, square: Tensor, *, step: int,
    generator: torch.Generator,
) -> None:
    beta1, beta2 = group["betas"]
    gradient_fp32 = gradient.float()
    moment_fp32 = moment.float().lerp_(gradient_fp32, 1 - beta1)
    square_fp32 = square.float().mul_(beta2).addcmul_(gradient_fp32, gradient_fp32, value=1 - beta2)
    moment.copy_(moment_fp32)
    round_into(square, square_fp32, generator)
    denominator = square_fp32.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight_fp32 = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
    weight_fp32.addcdiv_(moment_fp32, denominator, value=-group["lr"] / (1 - beta1**step))
    round_into(weight, weight_fp32, generator)
