"""The learning rate schedule and the optimizer: AdamW (Loshchilov and Hutter 2019, algorithm 2), alone or with Muon."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw
from transformers import PreTrainedModel

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.limits import STEP_ELEMENTS
from moedisco_ray.models import family_of
from moedisco_ray.models.expert_parallel import is_divided
from moedisco_ray.models.optimizer_state import Kind
from moedisco_ray.training import moments
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.muon import Muon, is_matrix
from moedisco_ray.training.rounding import generator, local, round_into

BETAS = (0.9, 0.95)
"""Decay rates of Adam's moments, usual for language models; equal in all trainings, so that one can continue another's
state."""
LARGEST_NORM = 1.0
"""Maximum norm of a gradient, to which larger ones are clipped; the usual value for language models."""
DECAY = 0.2
"""Share of the steps in which the schedule `wsd` decays the learning rate; its paper finds 10 to 20 % sufficient."""
_FINAL_SHARE = 0.1
"""Final learning rate of the cosine, as a share of the peak."""


def make_optimizer(model: PreTrainedModel, job: TrainJob, world: World) -> torch.optim.Optimizer:
    """Make the job's optimizer for all trainable parameters; norms and biases get no weight decay."""
    groups: dict[tuple[int | None, bool, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # `gate_up_proj` holds two matrices one after the other, unless the family alternates the columns of gate
            # and up.
            halves = 2 if name.endswith("gate_up_proj") and not family_of(model).interleaved else 1
            by_muon = job.optimizer.name == "muon" and is_matrix(name, parameter)
            decays = parameter.ndim > 1 and not name.endswith("_bias")
            # One operation takes sharded tensors of one mesh only, and experts may have a mesh of their own.
            groups[halves if by_muon else None, decays, is_divided(parameter)].append(parameter)
    decay = job.optimizer.weight_decay
    made = list[dict[str, Any]]()
    for key in sorted(groups, key=lambda key: (key[0] or 0, not key[1], key[2])):
        muon_halves, decays, _ = key
        group: dict[str, Any] = {"params": groups[key], "weight_decay": decay if decays else 0.0}
        made.append(group | {"halves": muon_halves} if muon_halves else group)
    rank = world.shard + job.share.member  # members of one worker each have the same seed, but round independently
    make_adamw = functools.partial(
        adamw, recipe=job.optimizer, seed=job.seed, rank=rank, in_parts=job.memory == "streamed"
    )
    return Muon(made, job.optimizer, make_adamw, job.seed, rank) if job.optimizer.name == "muon" else make_adamw(made)


def learning_rate(step: int, steps: int, optimizer: Optimizer, span: tuple[float, float] = (0.0, 1.0)) -> float:
    """The learning rate of a step: linear warm-up, then constant or a cosine down to a tenth.

    The schedule spans the training, or the run.

    With w = warmup * steps rounded up: lr (step + 1) / w while step < w. The cosine starts at step s, and the rate is
    lr until then. For `cosine`, s = w. For `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM, arXiv 2404.06395), s
    is the later of w and steps - 0.2 steps, with 0.2 steps rounded up. With t = (step - s) / (steps - 1 - s) the rate
    is lr (0.1 + 0.9 (1 + cos(pi t)) / 2), after Loshchilov and Hutter 2017, SGDR, equation 5.

    `run_cosine` is the cosine of the run. A training that covers the run's share `span`, from a to b, makes the steps
    from a n to b n of a run of n = steps / (b - a) steps.

    Args:
        step: Step, counted from 0.
        steps: Steps of the whole training.
        optimizer: The recipe: `lr`, `schedule` and `warmup` are read.
        span: Part of the run's tokens that the training covers; only `run_cosine` reads it.
    """
    here, length = float(step), float(steps)
    if optimizer.schedule == "run_cosine":
        begin, end = span
        length = round(steps / (end - begin), 6)  # shares are rounded; a whole number of steps should stay one
        here = begin * length + step
    decay_start = warmup = math.ceil(optimizer.warmup * length)
    if here < warmup:
        return optimizer.lr * min(1.0, (here + 1) / warmup)
    if optimizer.schedule == "wsd":
        decay_start = max(warmup, steps - math.ceil(DECAY * steps))
    if optimizer.schedule == "constant" or here < decay_start:
        return optimizer.lr
    progress = min(1.0, (here - decay_start) / max(1, length - 1 - decay_start))
    return optimizer.lr * (_FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw(
    groups: Iterable[dict[str, Any]], recipe: Optimizer, seed: int, rank: int = 0, *, in_parts: bool = False
) -> torch.optim.Optimizer:
    """Make an AdamW that stores its moments in the dtype and the memory that the recipe names.

    Args:
        groups: Parameter groups in torch's format.
        recipe: Learning rate, precision, and storage of the moments.
        seed: Seed of stochastic rounding.
        rank: Rank of this worker; workers round their parts of a tensor independently.
        in_parts: Whether it must be able to update parts of tensors (`RoundingAdamW.update_part`).
    """
    fp8, offload = recipe.moments == "fp8", bool(recipe.offload_moments)
    if recipe.state == "fp32" and not fp8 and not offload and not in_parts:
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, fused=True)
    return RoundingAdamW(groups, lr=recipe.lr, seed=seed, rank=rank, fp8=fp8, offload=offload)


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW that needs less memory: with weights, gradients and both moments in bf16, 8 bytes per parameter.

    A second moment with a beta near 1 would never change if it were rounded to nearest. So weights and second moments
    are computed in fp32 and rounded at random (`training.rounding`). The first moment changes far more per step and is
    rounded to nearest.

    Weights in fp32 are not rounded, and with moments in fp32 too, torch's own fused kernel updates them.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        seed: Seed of the rounding.
        rank: Rank of this worker.
        fp8: Whether matrices have moments in 8 bits; see `training.moments`.
        offload: Whether the moments are in the machine's memory. The result is the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        fp8: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": BETAS, "eps": 1e-8, "weight_decay": weight_decay})
        self._seed = seed
        self._rank = rank
        self._fp8 = fp8
        self._offload = offload

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("RoundingAdamW takes no closure")
        generators: dict[tuple[torch.device, int], torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self.add_state(parameter)
                state = self.state[parameter]
                state["step"] += 1
                step = int(state["step"])
                key = (parameter.device, step)
                if key not in generators:
                    generators[key] = self.rounding(parameter.device, step)
                self.update_part(group, parameter, parameter.grad, state, step=step, source=generators[key])
        for device in {device for device, _ in generators if device.type == "cuda" and self._offload}:
            torch.cuda.synchronize(device)  # the copies to the machine's memory, which a checkpoint may read next

    def add_state(self, parameter: nn.Parameter) -> None:
        """Give a parameter the state of a training that has made no step, unless it has a state."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
        if len(state) == 1:
            moments.add_moments(state, parameter, fp8=self._fp8, offload=self._offload)

    def rounding(self, device: torch.device, step: int) -> torch.Generator:
        """Generator of the random bits of a step."""
        return generator(device, self._seed, step, self._rank)

    @staticmethod
    def update_part(
        group: dict[str, Any],
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Any],
        *,
        step: int,
        source: torch.Generator,
    ) -> None:
        """Update a parameter, or rows of it with their gradient and state, in place.

        Args:
            group: The parameter's group, with the settings.
            parameter: The parameter, or rows of it.
            gradient: Its gradient.
            state: Its moments, and their scales.
            step: Number of the step, counted from 1.
            source: Generator of the random bits of rounding.
        """
        _update(group, parameter, gradient, state, step=step, source=source)

    @torch.no_grad()
    def set_moment(self, parameter: nn.Parameter, key: Kind, moment: Tensor) -> None:
        """Set a moment of a parameter. The parameter's optimizer state must already hold the number of steps.

        Args:
            parameter: The parameter.
            key: Name of the moment, `exp_avg` or `exp_avg_sq`.
            moment: The moment, with dtype, device and sharding of the parameter.
        """
        self.add_state(parameter)
        state = self.state[parameter]
        scales = state.get(key + moments.SCALE)
        if scales is None:
            state[key].copy_(moment)
        elif local(moment).numel():
            value = local(moment).float().reshape(-1)
            source = generator(value.device, self._seed, 0, self._rank)
            numbers, scale = (local(each).view(-1).to(value.device) for each in (state[key], scales))
            is_root = key == "exp_avg_sq"
            moments.encode(value.sqrt() if is_root else value.clone(), numbers, scale, source, is_root=is_root)
            for far, near in ((state[key], numbers), (scales, scale)):
                local(far).view(-1).copy_(near)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state as it is; torch would convert it to the dtype and the device of the parameters.

        Settings are not changed.
        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = state_dict["state"][key]


def _update(
    group: dict[str, Any],
    parameter: Tensor,
    whole_gradient: Tensor,
    state: Mapping[str, Any],
    *,
    step: int,
    source: torch.Generator,
) -> None:
    weight = local(parameter).view(-1)
    if not weight.numel():  # this worker may have no rows of an unevenly sharded tensor
        return
    has_scales = "exp_avg" + moments.SCALE in state
    elements = moments.elements_at_once(parameter, STEP_ELEMENTS) if has_scales else STEP_ELEMENTS
    split: list[Iterable[Any]] = [torch.split(each, elements) for each in (weight, local(whole_gradient).reshape(-1))]
    count = -(-weight.numel() // elements)
    for key in ("exp_avg", "exp_avg_sq"):
        split.append(torch.split(local(state[key]).view(-1), elements))
        scales = state.get(key + moments.SCALE)
        split.append(
            itertools.repeat(None, count)
            if scales is None
            else torch.split(local(scales).view(-1), moments.scales_per_part(parameter, elements))
        )
    for part_weight, gradient, *stored in zip(*split, strict=True):
        # For moments in the machine's memory, these are copies; else the moments themselves.
        near = [None if each is None else each.to(part_weight.device, non_blocking=True) for each in stored]
        _update_part(group, part_weight, gradient, near, step=step, source=source)
        for far, each in zip(stored, near, strict=True):
            if far is not None and far is not each:
                far.copy_(each, non_blocking=True)
        del near, each  # their memory is for the next part


def _update_part(
    group: dict[str, Any],
    weight: Tensor,
    gradient: Tensor,
    stored: Sequence[Any],
    *,
    step: int,
    source: torch.Generator,
) -> None:
    moment, moment_scales, square, square_scales = stored
    beta1, beta2 = group["betas"]
    if weight.dtype is torch.float32 and moment_scales is None:
        steps = torch.full((), float(step - 1), device=weight.device)
        torch_adamw(
            [weight],
            [gradient],
            [moment],
            [square],
            max_exp_avg_sqs=[],
            state_steps=[steps],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        return
    gradient_fp32 = gradient.float()
    moment_fp32 = moments.decoded(moment, moment_scales).lerp_(gradient_fp32, 1 - beta1)
    square_fp32 = moments.decoded(square, square_scales)
    if square_scales is not None:
        square_fp32.square_()
    square_fp32.mul_(beta2).addcmul_(gradient_fp32, gradient_fp32, value=1 - beta2)
    if moment_scales is None:
        moment.copy_(moment_fp32)
        round_into(square, square_fp32, source)
    root_fp32 = square_fp32.sqrt_()
    correction = math.sqrt(1 - beta2**step)
    denominator = root_fp32.div_(correction) if moment_scales is None else root_fp32 / correction
    denominator.add_(group["eps"])
    weight_fp32 = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
    weight_fp32.addcdiv_(moment_fp32, denominator, value=-group["lr"] / (1 - beta1**step))
    if weight.dtype is torch.bfloat16:
        round_into(weight, weight_fp32, source)
    if moment_scales is not None:
        del denominator, weight_fp32  # frees memory for the random bits of rounding
        moments.encode(moment_fp32, moment, moment_scales, source, is_root=False)
        moments.encode(root_fp32, square, square_scales, source, is_root=True)
