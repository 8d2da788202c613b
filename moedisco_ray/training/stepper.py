"""Optimizer steps: forward and backward passes over the micro-batches, gradient clipping, and the update.

`Stepper` is what the training loop needs of them. `ResidentStepper` has the model on the device, or divided among the
devices of a gang; `streamed_stepper.StreamedStepper` has it in the host's memory. Both add up each gradient in the
order of the micro-batches, that of a tied head apart from that of the embedding, so they give the same bits on a CPU.
"""

from __future__ import annotations

import abc
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moedisco_ray.models.expert_parallel import is_divided
from moedisco_ray.training import compile_probe, objective
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.blocks import Blocks
from moedisco_ray.training.compiled import compile_layers
from moedisco_ray.training.expert_check import check_experts
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.lora import SumsAgain
from moedisco_ray.training.optimizer import LARGEST_NORM, make_optimizer
from moedisco_ray.training.rounding import local
from moedisco_ray.training.sharding import Exchanges, SummedLoss, autocast, compute_dtype, reshard

T = TypeVar("T")


class Stepper(abc.ABC):
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
        self._step = 0

    def select(self, step: int) -> None:
        """Select the weights that train in a step; empty the optimizer's state when another block begins to train."""
        self._step = step
        if self._blocks is not None and self._blocks.select(step):
            self._parameters = _trained(self._model)
            self.optimizer.state.clear()
            self.optimizer.param_groups[:] = make_optimizer(self._model, self._job, self._world).param_groups

    def restore(self, fractions_NE: list[list[float]]) -> None:
        if self._probe is not None and fractions_NE:
            self.fractions_NE = torch.tensor(fractions_NE, device=self._world.device)

    @abc.abstractmethod
    def __call__(self, micro_batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor, int]:
        """Make a step at the current learning rate, on this worker's part of the global batch.

        Returns:
            Cross-entropy in nats, summed over this worker's tokens; the norm of the whole gradient before clipping; and
            the number of tokens of the global batch that the loss counts.
        """

    @abc.abstractmethod
    def losses(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Evaluate batches without training; no step may be made meanwhile.

        Args:
            batches: Inputs and targets [B, L] on the CPU.

        Yields:
            For each batch, its cross-entropy in nats, summed over the targets; and the targets.
        """

    def _check_experts(self, loss_tokens: int) -> None:
        """After the first backward pass, check that each selected expert has a gradient."""
        # Where the loss leaves tokens out, the last layer's experts of those tokens have no gradient.
        if self._probe is not None and not self._checked and loss_tokens == self._job.step_tokens:
            check_experts(self._model, self._selections_NE, self._world)
            self._checked = True

    def _note_fractions(self) -> None:
        if self._probe is not None:
            self.fractions_NE = self._selections_NE / self._job.step_tokens


class ResidentStepper(Stepper):
    """Makes steps of a model whose weights are on the device, or divided among the devices of a gang."""

    def __init__(self, model: PreTrainedModel, job: TrainJob, world: World) -> None:
        if job.optimizer.compile:
            compile_layers(model, world.device)
        self._tries_compiler = compile_probe.may_compile(job, world)
        self._sums = SumsAgain(model)
        self._exchanges = Exchanges(model, job.exchange)
        super().__init__(model, job, world)

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor, int]:
        """Make a step; see `Stepper`."""
        self._selections_NE.zero_()
        if self._tries_compiler:
            micro_batches = self._try_compiler(iter(micro_batches))
        losses, loss_tokens = [], self._job.step_tokens
        with _HeadApart(self._model, self._world):
            for micro, last in _marking_last(micro_batches):
                self._exchanges.before(last=last)
                losses.append(self._backward(micro))
                loss_tokens = micro.loss_tokens
        if self._probe is not None and self._world.size > 1:
            dist.all_reduce(self._selections_NE)
        self._check_experts(loss_tokens)
        norm = _clip(self._parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._note_fractions()
        return torch.stack(losses).sum(), norm, loss_tokens

    @torch.no_grad()
    def losses(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Evaluate batches; see `Stepper`."""
        device = self._world.device
        self._model.eval()
        for inputs_BL, targets_BL in batches:
            with autocast(self._job.optimizer, self._world):
                loss_sum = self._model(inputs_BL.to(device), targets_BL.to(device))
            yield loss_sum, targets_BL
        self._model.train()
        reshard(self._model)

    def _try_compiler(self, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        self._tries_compiler = False
        first = next(micro_batches)
        passes = (self._job.steps - self._step) * -(-self._job.batch // len(first.inputs_BL))
        compiling = functools.partial(compile_layers, self._model, self._world.device)
        dtype = compute_dtype(self._job.optimizer, self._world.device)
        compile_probe.probe(compiling, lambda: self._measured(first), passes, self._job.name, dtype)
        return itertools.chain([first], micro_batches)

    def _measured(self, micro: MicroBatch) -> compile_probe.Trial:
        """Compute a micro-batch, and drop its gradient."""
        began = time.monotonic()
        try:
            loss = self._backward(micro)
            gradients = [each.grad for each in self._parameters if each.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            return compile_probe.Trial(loss.item(), norm.item(), time.monotonic() - began)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self._selections_NE.zero_()

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


class _HeadApart:
    """Adds up the gradient of a tied head apart from that of the embedding, and adds both at the end of the block.

    A model that several workers share adds up both as they come.
    """

    def __init__(self, model: PreTrainedModel, world: World) -> None:
        weight = model.get_output_embeddings().weight
        apart = world.size == 1 and weight is model.get_input_embeddings().weight and weight.requires_grad
        self._model = model if apart and isinstance(model, SummedLoss) else None
        self._weight = weight

    def __enter__(self) -> None:
        if self._model is not None:
            self._model.head_weight = self._weight.detach().requires_grad_()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._model is None:
            return
        head, self._model.head_weight = self._model.head_weight, None
        if head is not None and head.grad is not None:
            self._weight.grad = head.grad if self._weight.grad is None else self._weight.grad.add_(head.grad)


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
