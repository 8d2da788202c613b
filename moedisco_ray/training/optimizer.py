"""The learning rate schedule, and AdamW (Loshchilov and Hutter 2019, algorithm 2) with 16 or 8 bytes per parameter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moedisco_ray.core.config import Optimizer
from moedisco_ray.training.job import TrainJob, World

BETAS = (0.9, 0.95)
"""Decay rates of Adam's moments, usual for language models; equal in all trainings, which can so inherit the state."""
LARGEST_NORM = 1.0
"""Maximum norm of a gradient, to which larger ones are clipped; the usual value for language models."""
DECAY = 0.2
"""Share of the steps in which `wsd` decays: the 10 to 20 % that its paper finds sufficient."""
STEP_ELEMENTS = 2**24
"""Maximum elements that `RoundingAdamW` updates at once (320 MiB of fp32 copies): an embedding alone would need several GB."""
_FINAL_SHARE = 0.1
"""Final learning rate of the cosine, as a share of the peak."""


def make_optimizer(model: PreTrainedModel, job: TrainJob, world: World) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters; norms and biases (one axis) get no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.ndim > 1) is decays], "weight_decay": job.optimizer.weight_decay if decays else 0.0}
        for decays in (True, False)]
    return adamw([group for group in groups if group["params"]], job.optimizer, job.seed, world.rank)


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
    """AdamW with the storage type of the recipe.

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

    bf16 has 8 significant bits. With rounding to nearest, a weight would lose every update below 1/512 of it, and a second moment
    with a beta near 1 would never change. So both are computed in fp32 and rounded up or down at random, with probabilities that
    make the expected value exact. The first moment changes far more per step and is rounded to nearest.

    The random bits come from a generator keyed by (seed, step, rank): the same run gives the same weights, resumed or not.

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
                    generators[key] = _generator(parameter.device, self._seed, step, self._rank)
                self._update(group, parameter, state, step, generators[key])

    @staticmethod
    def _update(
        group: dict[str, Any], parameter: Tensor, state: dict[str, Any], step: int, generator: torch.Generator,
    ) -> None:
        tensors = (_local(each) for each in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        gradient = _local(parameter.grad).reshape(-1)
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
    _round_into(square, square_fp32, generator)
    denominator = square_fp32.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight_fp32 = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
    weight_fp32.addcdiv_(moment_fp32, denominator, value=-group["lr"] / (1 - beta1**step))
    _round_into(weight, weight_fp32, generator)


def _round_into(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    # bf16 is the upper half of fp32: adding 16 random bits carries into it with probability (lower half) / 2^16.
    bits = value.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    bits &= -(1 << 16)
    target.copy_(value)


def _generator(device: torch.device, seed: int, step: int, rank: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
