"""Optimizer steps of a model whose weights and optimizer state are in the host's memory.

A step is layer-major. In the forward pass all micro-batches go through a layer before the next layer comes to the
device, and the inputs of the layers that the backward pass reaches are kept in the host's memory. The backward pass
copies these layers again with their inputs, computes them again, and sends their gradients to the host. The norm of the
whole gradient is known only then, so the update is a third pass (`streamed_update`). The next layer is copied while one
is computed (`host_copies`).

torch's `CPUOffloadPolicy` and DeepSpeed's ZeRO-Offload copy all layers for every micro-batch, and update on the CPU,
where Muon's products would take longer than the training. MegaTrain (arXiv 2604.05091) is layer-major too, but updates
on the CPU.

On a CPU the result is that of `ResidentStepper`, bit for bit: autograd runs the same operations in the same order.

Axes: B sequences of a micro-batch, L positions, T = B L tokens, N routers, E experts, D hidden.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models import head_inputs
from moedisco_ray.models.attention import bounds_for, document_arguments
from moedisco_ray.models.layer_stream import layer_alone
from moedisco_ray.training import objective
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.cross_entropy import summed_cross_entropy
from moedisco_ray.training.host_copies import Ahead, Copies
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.optimizer import LARGEST_NORM
from moedisco_ray.training.sharding import autocast
from moedisco_ray.training.stepper import Stepper
from moedisco_ray.training.streamed_update import add_states, state_tensors, update

_INPUT = "input "
"""Beginning of the names under which the inputs of a layer come to the device, before the number of the micro-batch."""


def check_streamed(job: TrainJob, world: World) -> None:
    """Refuse what streamed training does not do.

    Raises:
        ConfigError: A setting needs the weights on the device.
    """
    if job.optimizer.compile:
        raise ConfigError(
            "optimizer.compile", value=True, remedy="needs memory: resident of the pool; leave it out, or set that"
        )
    if world.size > 1:
        raise ConfigError("pools.*.memory", "streamed", f"trains on one worker, not on {world.size}; set resident")


class StreamedStepper(Stepper):
    """Makes steps of a model in the host's memory, one layer at a time on the device.

    Args:
        model: The model, in the host's memory.
        job: The training.
        world: Device that computes.
        copies: Copies to the device and back; None: those that suit the device.

    Raises:
        ConfigError: A setting needs the weights on the device.
    """

    def __init__(self, model: PreTrainedModel, job: TrainJob, world: World, copies: Copies | None = None) -> None:
        check_streamed(job, world)
        super().__init__(model, job, world)
        self._device = torch.device(world.device)
        self._copies = copies or Copies(self._device)
        base: Any = model.base_model
        self._embedding = _Part(base.embed_tokens, "")
        self._layers = [_Part(layer_alone(model, n), f"layers.{n}.") for n in range(len(base.layers))]
        self._end = _Part(_End(model), "")
        self._embedded: nn.Parameter = base.embed_tokens.weight
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._inputs: dict[tuple[int, int], Tensor] = {}
        add_states(self.optimizer)

    def select(self, step: int) -> None:
        """Select the weights that train in a step; see `Stepper`."""
        super().select(step)
        add_states(self.optimizer)
        trained = set(self._parameters)
        self._gradients = {each: gradient for each, gradient in self._gradients.items() if each in trained}

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor, int]:
        """Make a step; see `Stepper`."""
        micros = [
            dataclasses.replace(each, bounds_N=bounds_for(self._model, each.positions_BL)) for each in micro_batches
        ]
        self._prepare_host()
        self._selections_NE.zero_()
        first = self._first_trained
        ahead = Ahead(self._copies, self._step_groups(first, len(micros)))
        states = self._forward(micros, ahead, kept_from=first)
        norms: dict[nn.Parameter, Tensor] = {}
        losses = self._backward_end(micros, states, ahead, norms)
        for index in range(len(self._layers) - 1, max(first, 0) - 1, -1):
            self._backward_layer(index, micros, states, ahead, norms)
        if self._embedded.requires_grad:
            self._backward_embedding(micros, states, norms)
        del states
        self._copies.finish()
        self._check_experts(micros[0].loss_tokens)
        norm = torch.linalg.vector_norm(torch.stack([norms[each] for each in self._parameters if each in norms]))
        update(self.optimizer, (LARGEST_NORM / (norm + 1e-6)).clamp(max=1.0), self._copies, self._device)
        self.optimizer.zero_grad(set_to_none=True)
        self._note_fractions()
        return torch.stack(losses).sum(), norm, micros[0].loss_tokens

    @torch.no_grad()
    def losses(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Evaluate batches, as many at a time as a step has tokens; see `Stepper`."""
        self._model.eval()
        remaining = iter(batches)
        while group := list(_taken(remaining, self._job.step_tokens)):
            micros = [
                MicroBatch(inputs_BL.to(self._device), targets_BL.to(self._device), loss_tokens=1, weights_B=None)
                for inputs_BL, targets_BL in group
            ]
            ahead = Ahead(self._copies, [part.tensors for part in self._parts])
            states = self._forward(micros, ahead, kept_from=None)
            near = ahead.take()
            for micro, hidden_BLD, (_, targets_BL) in zip(micros, states, group, strict=True):
                yield self._loss(near, hidden_BLD, micro), targets_BL
        self._model.train()

    def _prepare_host(self) -> None:
        """Make room for gradients, and pin what will be copied; what exists already stays."""
        for parameter in self._parameters:
            if parameter not in self._gradients:
                self._gradients[parameter] = self._copies.host_like(parameter)
        for tensor in itertools.chain(*(part.tensors.values() for part in self._parts), state_tensors(self.optimizer)):
            self._copies.pin(tensor)

    @property
    def _parts(self) -> list[_Part]:
        return [self._embedding, *self._layers, self._end]

    @property
    def _first_trained(self) -> int:
        """The first layer with weights that train; -1 if the embedding trains; without any, the number of layers."""
        if self._embedded.requires_grad:
            return -1
        return next((n for n, part in enumerate(self._layers) if part.trains), len(self._layers))

    def _step_groups(self, first: int, micros: int) -> Iterator[Mapping[str, Tensor]]:
        """What comes to the device in a step, in this order, without the update."""
        for part in self._parts:
            yield part.tensors
        for index in range(len(self._layers) - 1, max(first, 0) - 1, -1):
            kept = {f"{_INPUT}{m}": self._inputs[index, m] for m in range(micros)}
            yield {**self._layers[index].tensors, **kept}

    @torch.no_grad()
    def _forward(self, micros: Sequence[MicroBatch], ahead: Ahead, kept_from: int | None) -> list[Tensor]:
        """Outputs of the last layer [B, L, D] of each micro-batch.

        Args:
            micros: The micro-batches.
            ahead: Brings the weights.
            kept_from: First layer whose inputs are kept for a backward pass; None: no such pass follows, and the
                routers' selections do not count either.
        """
        near = ahead.take()
        states: list[Tensor] = [functional_call(self._embedding.module, near, (each.inputs_BL,)) for each in micros]
        ahead.ask()
        del near
        for index in range(len(self._layers)):
            near = ahead.take()
            for m, micro in enumerate(micros):
                if kept_from is not None and index >= kept_from:
                    self._keep(index, m, states[m])
                states[m], sums = self._run(index, near, states[m], micro)
                ahead.ask()
                if kept_from is not None and sums is not None and self._probe is not None:
                    self._selections_NE[self._probe.rows[index]] += sums.selections_NE[0]
            del near
        return states

    def _run(
        self, index: int, near: Mapping[str, Tensor], hidden_BLD: Tensor, micro: MicroBatch
    ) -> tuple[Tensor, objective.RouterSums | None]:
        """Output of a layer, and the sums of its router if it has one with several experts."""
        documents = document_arguments(self._model, micro.inputs_BL, micro.positions_BL, micro.bounds_N)
        arguments = {"inputs_embeds": hidden_BLD, "use_cache": False, **documents}
        module = self._layers[index].module
        if self._probe is None or index not in self._probe.rows:
            with autocast(self._job.optimizer, self._world):
                return functional_call(module, dict(near), (), arguments).last_hidden_state, None
        with self._probe.recording(micro.weights_T), autocast(self._job.optimizer, self._world):
            output_BLD = functional_call(module, dict(near), (), arguments).last_hidden_state
        return output_BLD, self._probe.sums()

    def _loss(self, near: Mapping[str, Tensor], hidden_BLD: Tensor, micro: MicroBatch) -> Tensor:
        with autocast(self._job.optimizer, self._world):
            loss: Tensor = functional_call(self._end.module, dict(near), (hidden_BLD, micro.targets_BL))
        return loss

    def _backward_end(
        self, micros: Sequence[MicroBatch], states: list[Tensor], ahead: Ahead, norms: dict[nn.Parameter, Tensor]
    ) -> list[Tensor]:
        """Loss of each micro-batch; `states` then has the gradients of the last layer's outputs."""
        near, losses = self._end.leaves(ahead.take()), []
        below = self._first_trained < len(self._layers)
        for m, micro in enumerate(micros):
            hidden_BLD = states[m].detach().requires_grad_(below)
            loss_sum = self._loss(near, hidden_BLD, micro)
            torch.autograd.backward(loss_sum / micro.loss_tokens)
            losses.append(loss_sum.detach())
            states[m] = hidden_BLD.grad if below and hidden_BLD.grad is not None else hidden_BLD
            ahead.ask()
        self._send(self._end, near, norms)
        return losses

    def _backward_layer(
        self,
        index: int,
        micros: Sequence[MicroBatch],
        states: list[Tensor],
        ahead: Ahead,
        norms: dict[nn.Parameter, Tensor],
    ) -> None:
        """Replace the gradients of a layer's outputs in `states` by those of its inputs; send those of its weights."""
        part, below = self._layers[index], self._first_trained < index
        found = ahead.take()
        inputs = [found.pop(f"{_INPUT}{m}") for m in range(len(micros))]
        near = part.leaves(found)
        for m, micro in enumerate(micros):
            hidden_BLD = inputs[m].requires_grad_(below)
            output_BLD, sums = self._run(index, near, hidden_BLD, micro)
            roots, gradients = [output_BLD], [states[m]]
            if sums is not None:
                roots.append(self._router_loss(index, sums))
                gradients.append(torch.ones_like(roots[1]))
            wanted = [root.requires_grad for root in roots]
            torch.autograd.backward(
                list(itertools.compress(roots, wanted)), list(itertools.compress(gradients, wanted))
            )
            del output_BLD, roots
            states[m] = hidden_BLD.grad if below and hidden_BLD.grad is not None else hidden_BLD
            ahead.ask()
        self._send(part, near, norms)

    def _router_loss(self, index: int, sums: objective.RouterSums) -> Tensor:
        rows, tokens, job = len(self.fractions_NE), self._job.step_tokens, self._job
        n = 0 if self._probe is None else self._probe.rows[index]
        balance = objective.load_balance_loss(sums.probabilities_NE, self.fractions_NE[n : n + 1], tokens, rows)
        z = objective.z_loss(sums.log_partition_N, tokens, rows)
        return job.load_balance * balance + job.z_loss * z

    @torch.no_grad()
    def _backward_embedding(
        self, micros: Sequence[MicroBatch], states: Sequence[Tensor], norms: dict[nn.Parameter, Tensor]
    ) -> None:
        self._copies.finish()  # the memory of the layers is for the gradient
        weight, padding = self._embedded, self._embedding.module.padding_idx
        sum_VD: Tensor | None = None
        for micro, gradient_BLD in zip(micros, states, strict=True):
            found_VD = torch.ops.aten.embedding_dense_backward(
                gradient_BLD.to(weight.dtype),
                micro.inputs_BL,
                num_weights=len(weight),
                padding_idx=-1 if padding is None else padding,
                scale_grad_by_freq=False,
            )
            sum_VD = found_VD if sum_VD is None else sum_VD.add_(found_VD)
        if sum_VD is None:
            return
        if weight.grad is not None:  # of the tied head
            sum_VD.add_(self._copies.begin({"head": weight.grad})()["head"])
        self._send_gradient(weight, sum_VD, norms)

    def _send(self, part: _Part, near: Mapping[str, Tensor], norms: dict[nn.Parameter, Tensor]) -> None:
        for name, leaf in near.items():
            if leaf.grad is not None:
                self._send_gradient(part.parameters[name], leaf.grad, norms)

    @torch.no_grad()
    def _send_gradient(self, parameter: nn.Parameter, gradient: Tensor, norms: dict[nn.Parameter, Tensor]) -> None:
        norms[parameter] = torch._foreach_norm([gradient])[0]  # noqa: SLF001 - with which torch clips
        parameter.grad = self._gradients[parameter]
        self._copies.send(gradient, parameter.grad)

    def _keep(self, index: int, m: int, hidden_BLD: Tensor) -> None:
        """Keep an input of a layer in the host's memory until the backward pass."""
        kept = self._inputs.get((index, m))
        if kept is None or kept.shape != hidden_BLD.shape:
            kept = self._inputs[index, m] = self._copies.host_like(hidden_BLD)
        self._copies.send(hidden_BLD, kept)


class _Part:
    """A part of a model whose weights come to the device together.

    Attributes:
        module: Computes the part, by the names of `tensors`.
        tensors: Parameters and buffers in the host's memory.
        parameters: Those that are parameters.
    """

    def __init__(self, module: Any, prefix: str) -> None:
        self.module = module
        self.parameters = {name: each for name, each in module.named_parameters() if name.startswith(prefix)}
        buffers = {name: each for name, each in module.named_buffers() if name.startswith(prefix)}
        self.tensors: dict[str, Tensor] = {**self.parameters, **buffers}

    @property
    def trains(self) -> bool:
        """Whether a weight of the part trains."""
        return any(each.requires_grad for each in self.parameters.values())

    def leaves(self, near: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the copies of the weights that train get gradients; return all copies."""
        for name, parameter in self.parameters.items():
            near[name].requires_grad_(parameter.requires_grad)
        return near


class _End(nn.Module):
    """The last norm, the head and the loss of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        base: Any = model.base_model
        self.norm, self.head = base.norm, model.get_output_embeddings()
        self._whole = (model,)  # a tuple, because a module would be a part of this one

    def forward(self, hidden_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        hidden_TD = head_inputs(self._whole[0], self.norm(hidden_BLD).flatten(0, 1))
        head: Any = self.head
        return summed_cross_entropy(hidden_TD, head.weight, targets_BL.flatten(), head.bias)


def _taken(batches: Iterator[tuple[Tensor, Tensor]], positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The next batches, of at least a number of positions together, or all that are left."""
    for pair in batches:
        yield pair
        positions -= pair[0].numel()
        if positions <= 0:
            return
