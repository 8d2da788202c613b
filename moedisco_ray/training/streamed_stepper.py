"""Optimizer steps of a model whose weights and optimizer state are in the host's memory.

A step is layer-major. In the forward pass all micro-batches go through a layer before the next layer comes to the
device, and the inputs of the layers that the backward pass reaches are kept in the host's memory. The backward pass
copies these layers again with their inputs, computes them again, and sends their gradients to the host. The norm of the
whole gradient is known only then, so the update is a third pass (`streamed_update`). The next layer is copied while one
is computed (`host_copies`). Several cards of one machine divide layers, the loss and the update (`streamed_cards`).

torch's `CPUOffloadPolicy` and DeepSpeed's ZeRO-Offload copy all layers for every micro-batch, and update on the CPU,
where Muon's products would take longer than the training. MegaTrain (arXiv 2604.05091) is layer-major too, but updates
on the CPU.

On a CPU the result is that of `ResidentStepper`, bit for bit: autograd runs the same operations in the same order.
Several cards add up the gradient of the head in another order, and round to bf16 with other random bits.

Axes: B sequences of a micro-batch, L positions, T = B L tokens, N routers, E experts, D hidden.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.attention import bounds_for, document_arguments
from moedisco_ray.models.layer_stream import layer_alone
from moedisco_ray.training import objective
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.host_copies import Ahead, Copies
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.optimizer import LARGEST_NORM
from moedisco_ray.training.sharding import autocast
from moedisco_ray.training.stepper import Stepper
from moedisco_ray.training.streamed_cards import Card, Cards, Handover, OnCard, ThroughHost
from moedisco_ray.training.streamed_parts import End, Part, Step, gradient_of, on_device
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
    """Makes steps of a model in the host's memory, one layer at a time on each device.

    Args:
        model: The model, in the host's memory.
        job: The training.
        world: Devices that compute.
        make_copies: Makes the copies to a device and back; None: those that suit the device.

    Raises:
        ConfigError: A setting needs the weights on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        job: TrainJob,
        world: World,
        make_copies: Callable[[torch.device], Copies] | None = None,
    ) -> None:
        check_streamed(job, world)
        super().__init__(model, job, world)
        self._device = torch.device(world.device)
        self._cards = Cards([torch.device(each) for each in world.all_devices], make_copies or Copies)
        base: Any = model.base_model
        self._embedding = Part(base.embed_tokens, "")
        self._layers = [Part(layer_alone(model, n), f"layers.{n}.") for n in range(len(base.layers))]
        self._ends = [Part(End(model), "") for _ in self._cards]
        self._embedded: nn.Parameter = base.embed_tokens.weight
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._places: dict[tuple[str, int, int], Tensor] = {}
        for card in self._cards:
            rotary = copy.deepcopy(base.rotary_emb).to(card.device) if card.number else base.rotary_emb
            for index in self._own(card):
                self._layers[index].module.rotary_emb = rotary
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
        step = self._begun(micros)
        self._cards.each(lambda card: self._passes(card, step))
        self._selections_NE.zero_()
        for index, selections_E in step.selections.items():
            self._selections_NE[self._row(index)] += selections_E.to(self._device)
        self._check_experts(micros[0].loss_tokens)
        norms = [step.norms[each].to(self._device) for each in self._parameters if each in step.norms]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        update(self.optimizer, (LARGEST_NORM / (norm + 1e-6)).clamp(max=1.0), self._cards)
        self.optimizer.zero_grad(set_to_none=True)
        self._note_fractions()
        losses = [step.losses[m].to(self._device) for m in range(len(micros))]
        return torch.stack(losses).sum(), norm, micros[0].loss_tokens

    @torch.no_grad()
    def losses(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Evaluate batches on the first device, as many at a time as a step has tokens; see `Stepper`."""
        self._model.eval()
        card, remaining = self._cards[0], iter(batches)
        while group := list(_taken(remaining, self._job.step_tokens)):
            micros = [
                MicroBatch(inputs_BL.to(self._device), targets_BL.to(self._device), loss_tokens=1, weights_BL=None)
                for inputs_BL, targets_BL in group
            ]
            ahead, states = Ahead(card.copies, self._groups_of_all_layers()), OnCard()
            self._embed(card, micros, ahead, states)
            for index in range(len(self._layers)):
                self._forward_layer(card, index, micros, ahead, states=states)
            near = ahead.take()
            for m, (_, targets_BL) in enumerate(group):
                yield self._loss(self._ends[0], near, states.take(card, len(self._layers), m), micros[m]), targets_BL
        self._model.train()

    def _begun(self, micros: Sequence[MicroBatch]) -> Step:
        on_cards = [on_device(micros, card.device) for card in self._cards]
        fractions = [self.fractions_NE.to(card.device) for card in self._cards]
        if len(self._cards) == 1:
            return Step(on_cards, fractions, OnCard(), OnCard())
        end = len(self._layers)
        states, gradients = (ThroughHost(self._cards, end, each) for each in (self._input_place, self._gradient_place))
        return Step(on_cards, fractions, states, gradients)

    def _passes(self, card: Card, step: Step) -> None:
        """Both passes of a card."""
        micros = step.micros[card.number]
        ahead = Ahead(card.copies, self._step_groups(card, len(micros)))
        with torch.no_grad():
            if not card.number:
                self._embed(card, micros, ahead, step.states)
            for index in self._own(card):
                self._forward_layer(card, index, micros, ahead, states=step.states, step=step)
        self._backward_end(card, step, ahead)
        for index in reversed(self._own(card)):
            if index >= self._first_trained:
                self._backward_layer(card, index, step, ahead)
        if not card.number:
            self._sum_ends(card, step)
            if self._embedded.requires_grad:
                self._backward_embedding(card, step)
        card.copies.finish()

    def _prepare_host(self) -> None:
        """Make room for gradients, and pin what will be copied; what exists already stays."""
        copies = self._cards[0].copies
        for parameter in self._parameters:
            if parameter not in self._gradients:
                self._gradients[parameter] = copies.host_like(parameter)
        for tensor in itertools.chain(
            *(each.values() for each in self._groups_of_all_layers()), state_tensors(self.optimizer)
        ):
            copies.pin(tensor)

    def _groups_of_all_layers(self) -> list[Mapping[str, Tensor]]:
        return [part.tensors for part in (self._embedding, *self._layers, self._ends[0])]

    def _own(self, card: Card) -> range:
        """The layers of a card."""
        return range(card.number, len(self._layers), len(self._cards))

    @property
    def _first_trained(self) -> int:
        """The first layer with weights that train; -1 if the embedding trains; without any, the number of layers."""
        if self._embedded.requires_grad:
            return -1
        return next((n for n, part in enumerate(self._layers) if part.trains), len(self._layers))

    def _step_groups(self, card: Card, micros: int) -> Iterator[Mapping[str, Tensor]]:
        """What comes to a device in a step, in this order, without the update."""
        if not card.number:
            yield self._embedding.tensors
        for index in self._own(card):
            yield self._layers[index].tensors
        yield self._ends[card.number].tensors
        for index in reversed(self._own(card)):
            if index >= self._first_trained:
                kept = {f"{_INPUT}{m}": self._places["input", index, m] for m in range(micros)}
                yield {**self._layers[index].tensors, **kept}

    def _embed(self, card: Card, micros: Sequence[MicroBatch], ahead: Ahead, states: Handover) -> None:
        near = ahead.take()
        for m, micro in enumerate(micros):
            states.put(card, 0, m, _call(self._embedding, near, micro.inputs_BL))
        ahead.ask()

    def _forward_layer(
        self,
        card: Card,
        index: int,
        micros: Sequence[MicroBatch],
        ahead: Ahead,
        *,
        states: Handover,
        step: Step | None = None,
    ) -> None:
        """Run a layer on all micro-batches; with a step, also for its backward pass and its routers' selections."""
        near, keeps = ahead.take(), step is not None and index >= self._first_trained and len(self._cards) == 1
        for m, micro in enumerate(micros):
            hidden_BLD = states.take(card, index, m)
            if keeps:
                card.copies.send(hidden_BLD, self._input_place(card, index, m, hidden_BLD))
            output_BLD, sums = self._run(index, near, hidden_BLD, micro)
            ahead.ask()
            states.put(card, index + 1, m, output_BLD)
            del hidden_BLD, output_BLD
            if step is not None and sums is not None:
                selections_E = sums.selections_NE[0]
                step.selections[index] = step.selections[index] + selections_E if m else selections_E

    def _run(
        self, index: int, near: Mapping[str, Tensor], hidden_BLD: Tensor, micro: MicroBatch
    ) -> tuple[Tensor, objective.RouterSums | None]:
        """Output of a layer, and the sums of its router if it has one with several experts."""
        documents = document_arguments(self._model, micro.inputs_BL, micro.positions_BL, micro.bounds_N)
        arguments = {"inputs_embeds": hidden_BLD, "use_cache": False, **documents}
        if self._probe is None or index not in self._probe.rows:
            with autocast(self._job.optimizer, self._world):
                return _call(self._layers[index], near, **arguments).last_hidden_state, None
        with self._probe.recording(micro.weights_T, layer=index), autocast(self._job.optimizer, self._world):
            output_BLD = _call(self._layers[index], near, **arguments).last_hidden_state
        return output_BLD, self._probe.sums(index)

    def _loss(self, end: Part, near: Mapping[str, Tensor], hidden_BLD: Tensor, micro: MicroBatch) -> Tensor:
        with autocast(self._job.optimizer, self._world):
            loss: Tensor = _call(end, near, hidden_BLD, micro.targets_BL)
        return loss

    def _backward_end(self, card: Card, step: Step, ahead: Ahead) -> None:
        """Loss of the card's part of the micro-batches, and the gradients of the last layer's outputs."""
        micros, part, end = step.micros[card.number], self._ends[card.number], len(self._layers)
        near, below = part.leaves(ahead.take()), self._first_trained < end
        for m in range(card.number, len(micros), len(self._cards)):
            hidden_BLD = step.states.take(card, end, m).detach().requires_grad_(below)
            loss_sum = self._loss(part, near, hidden_BLD, micros[m])
            torch.autograd.backward(loss_sum / micros[m].loss_tokens)
            step.losses[m] = loss_sum.detach()
            if below:
                step.gradients.put(card, end, m, gradient_of(hidden_BLD))
            ahead.ask()
        if len(self._cards) == 1:
            self._send(card, part, near, step)
            return
        sent = None
        for name, leaf in near.items():
            if leaf.grad is not None:
                sent = card.copies.send(leaf.grad, self._place(card, (name, card.number, 0), leaf.grad))
                step.end_parts.setdefault(name, []).append(card.number)
        step.ended.put(sent)

    def _backward_layer(self, card: Card, index: int, step: Step, ahead: Ahead) -> None:
        """Hand on the gradients of a layer's inputs; send those of its weights."""
        part, below = self._layers[index], self._first_trained < index
        micros, found = step.micros[card.number], ahead.take()
        inputs = [found.pop(f"{_INPUT}{m}") for m in range(len(micros))]
        near = part.leaves(found)
        for m, micro in enumerate(micros):
            hidden_BLD = inputs[m].requires_grad_(below)
            output_BLD, sums = self._run(index, near, hidden_BLD, micro)
            roots, gradients = [output_BLD], [step.gradients.take(card, index + 1, m)]
            if sums is not None:
                roots.append(self._router_loss(index, sums, step.fractions[card.number]))
                gradients.append(torch.ones_like(roots[1]))
            wanted = [root.requires_grad for root in roots]
            torch.autograd.backward(
                list(itertools.compress(roots, wanted)), list(itertools.compress(gradients, wanted))
            )
            del output_BLD, roots, gradients
            if below:
                step.gradients.put(card, index, m, gradient_of(hidden_BLD))
            inputs[m] = hidden_BLD = hidden_BLD.detach().new_empty(0)  # frees it, and its gradient
            ahead.ask()
        self._send(card, part, near, step)

    def _router_loss(self, index: int, sums: objective.RouterSums, fractions_NE: Tensor) -> Tensor:
        rows, tokens, job = len(fractions_NE), self._job.step_tokens, self._job
        n = self._row(index)
        balance = objective.load_balance_loss(sums.probabilities_NE, fractions_NE[n : n + 1], tokens, rows)
        z = objective.z_loss(sums.log_partition_N, tokens, rows)
        return job.load_balance * balance + job.z_loss * z

    def _row(self, index: int) -> int:
        """Number of a layer's router."""
        return 0 if self._probe is None else self._probe.rows[index]

    @torch.no_grad()
    def _sum_ends(self, card: Card, step: Step) -> None:
        """Add up the gradients of the last part, which every card has computed for some micro-batches."""
        if len(self._cards) == 1:
            return
        sent = [self._cards.waits(step.ended) for _ in self._cards]
        for name, numbers in step.end_parts.items():
            sum_: Tensor | None = None
            for number in sorted(numbers):
                card.copies.finish()  # all parts at once could take more memory than the card has
                part = card.copies.begin({name: self._places[name, number, 0]}, *sent)()[name]
                sum_ = part if sum_ is None else sum_.add_(part)
            if sum_ is not None:
                self._send_gradient(card, self._ends[0].parameters[name], sum_, step)

    @torch.no_grad()
    def _backward_embedding(self, card: Card, step: Step) -> None:
        card.copies.finish()  # the memory of the layers is for the gradient
        weight, padding = self._embedded, self._embedding.module.padding_idx
        sum_VD: Tensor | None = None
        for m, micro in enumerate(step.micros[card.number]):
            found_VD = torch.ops.aten.embedding_dense_backward(
                step.gradients.take(card, 0, m).to(weight.dtype),
                micro.inputs_BL,
                num_weights=len(weight),
                padding_idx=-1 if padding is None else padding,
                scale_grad_by_freq=False,
            )
            sum_VD = found_VD if sum_VD is None else sum_VD.add_(found_VD)
        if sum_VD is None:
            return
        if weight.grad is not None:  # of the tied head
            sum_VD.add_(card.copies.begin({"head": weight.grad})()["head"])
        self._send_gradient(card, weight, sum_VD, step)

    def _send(self, card: Card, part: Part, near: Mapping[str, Tensor], step: Step) -> None:
        for name, leaf in near.items():
            if leaf.grad is not None:
                self._send_gradient(card, part.parameters[name], leaf.grad, step)

    @torch.no_grad()
    def _send_gradient(self, card: Card, parameter: nn.Parameter, gradient: Tensor, step: Step) -> None:
        step.norms[parameter] = torch._foreach_norm([gradient])[0]  # noqa: SLF001 - with which torch clips
        parameter.grad = self._gradients[parameter]
        card.copies.send(gradient, parameter.grad)

    def _input_place(self, card: Card, index: int, m: int, near: Tensor) -> Tensor:
        return self._place(card, ("input", index, m), near)

    def _gradient_place(self, card: Card, index: int, m: int, near: Tensor) -> Tensor:
        # The gradients of c layers later come only when those of this layer have been used.
        return self._place(card, ("gradient", index % len(self._cards), m), near)

    def _place(self, card: Card, key: tuple[str, int, int], near: Tensor) -> Tensor:
        """A place in the host's memory for a tensor, which keeps it until the next step."""
        kept = self._places.get(key)
        if kept is None or kept.shape != near.shape:
            kept = self._places[key] = card.copies.host_like(near)
        return kept


def _call(part: Part, near: Mapping[str, Tensor], *inputs: Tensor, **arguments: Any) -> Any:
    """Compute a part with the weights on a device. No two of them are tied, which torch would look for in each call."""
    return functional_call(part.module, dict(near), inputs, arguments, tie_weights=False)


def _taken(batches: Iterator[tuple[Tensor, Tensor]], positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The next batches, of at least a number of positions together, or all that are left."""
    for pair in batches:
        yield pair
        positions -= pair[0].numel()
        if positions <= 0:
            return
