"""Optimizer steps: forward and backward passes over the micro-batches, gradient clipping, and the update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moedisco_ray.models.expert_parallel import is_divided
from moedisco_ray.training import objective
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.blocks import Blocks
from moedisco_ray.training.compiled import compile_layers
from moedisco_ray.training.expert_check import check_experts
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.lora import SumsAgain
from moedisco_ray.training.optimizer import LARGEST_NORM, make_optimizer
from moedisco_ray.training.rounding import local
from moedisco_ray.training.sharding import Exchanges, autocast

T = TypeVar("T")


class Stepper:
    """Makes optimizer steps: forward and backward passes, gradient clipping, and the update.

    Axes: B sequences of a micro-batch, L positions, T = B L tokens, N routers, E experts.

    Attributes:
        optimizer: Optimizer of the model's trainable parameters.
        fractions_NE: How often each expert was selected in the last global batch, per token.
    """

    def __init__(self, model: PreTrainedModel, job: TrainJob, world: World) -> None:
        self._model = model
        self._job = job
        self._world = world
        if job.optimizer.compile:
            compile_layers(model, world.device)
        self._sums = SumsAgain(model)
        self._exchanges = Exchanges(model, job.exchange)
        self._blocks = Blocks(model, job) if job.optimizer.block_steps else None
        if self._blocks is not None:
            self._blocks.select(0)
        self._parameters = _trained(model)
        self.optimizer = make_optimizer(model, job, world)
        probe = objective.RouterProbe(model) if job.load_balance or job.z_loss else None
        self._probe = probe if probe is not None and probe.layers else None
        self.fractions_NE = torch.zeros(0, 0)
        if self._probe is not None:
            uniform_NE = objective.uniform_fractions(self._probe.layers, self._probe.experts, self._probe.top_k)
            self.fractions_NE = uniform_NE.to(world.device)
        self._selections_NE = torch.zeros_like(self.fractions_NE)
        self._checked = False

    def select(self, step: int) -> None:
        """Select the weights that train in a step; empty the optimizer's state when another block begins to train."""
        if self._blocks is not None and self._blocks.select(step):
            self._parameters = _trained(self._model)
            self.optimizer.state.clear()
            self.optimizer.param_groups[:] = make_optimizer(self._model, self._job, self._world).param_groups

    def restore(self, fractions_NE: list[list[float]]) -> None:
        if self._probe is not None and fractions_NE:
            self.fractions_NE = torch.tensor(fractions_NE, device=self._world.device)

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor, int]:
        """Make a step at the current learning rate, on this worker's part of the global batch.

        Returns:
            Cross-entropy in nats, summed over this worker's tokens; the norm of the whole gradient before clipping; and
            the number of tokens of the global batch that the loss counts.
        """
        self._selections_NE.zero_()
        losses, loss_tokens = [], self._job.step_tokens
        for micro, last in _marking_last(micro_batches):
            self._exchanges.before(last=last)
            losses.append(self._backward(micro))
            loss_tokens = micro.loss_tokens
        if self._probe is not None and self._world.size > 1:
            dist.all_reduce(self._selections_NE)
        # Where the loss leaves tokens out, the last layer's experts of those tokens have no gradient.
        if self._probe is not None and not self._checked and loss_tokens == self._job.step_tokens:
            check_experts(self._model, self._selections_NE, self._world)
            self._checked = True
        norm = _clip(self._parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._probe is not None:
            self.fractions_NE = self._selections_NE / self._job.step_tokens
        return torch.stack(losses).sum(), norm, loss_tokens

    def _backward(self, micro: MicroBatch) -> Tensor:
        tokens = self._job.step_tokens
        if self._probe is None:
            loss_sum = self._forward(micro)
            torch.autograd.backward(loss_sum / micro.loss_tokens)
            return loss_sum.detach()
        with self._probe.recording(micro.weights_T):
            loss_sum = self._forward(micro)
        sums = self._probe.sums()
        self._selections_NE += sums.selections_NE
        balance = objective.load_balance_loss(sums.probabilities_NE, self.fractions_NE, tokens)
        z = objective.z_loss(sums.log_partition_N, tokens)
        torch.autograd.backward(loss_sum / micro.loss_tokens + self._job.load_balance * balance + self._job.z_loss * z)
        return loss_sum.detach()

    def _forward(self, micro: MicroBatch) -> Tensor:
        with autocast(self._job.optimizer, self._world), self._sums.saving():
            loss_sum: Tensor = self._model(micro.inputs_BL, micro.targets_BL, micro.positions_BL)
        return loss_sum


def _trained(model: PreTrainedModel) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _marking_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    remaining = iter(items)
    for item in remaining:
        for following in remaining:
            yield item, False
            item = following  # noqa: PLW2901
        yield item, True


def _clip(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Clip the gradients of all parameters together; returns their norm before."""
    # One operation takes sharded tensors of one mesh only.
    whole, divided = list[Tensor](), list[Tensor]()
    for each in parameters:
        if each.grad is not None:
            (divided if is_divided(each) else whole).append(each.grad)
    if not divided:
        return _gathered(torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM))
    norm = torch.stack([_gathered(torch.nn.utils.get_total_norm(part)) for part in (whole, divided)]).norm()
    factor = (LARGEST_NORM / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(each) for each in (*whole, *divided)], factor)  # as torch's own clipping
    return norm


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
