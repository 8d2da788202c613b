"""Time and memory of training with weights and optimizer state in the host's memory, one layer at a time on the card.

A step has three passes. In the forward pass, all micro-batches go through a layer before the next layer is copied to
the card; the inputs of each layer are kept in the host's memory. The backward pass copies each layer again, computes it
again from its inputs, and sends its gradients to the host. The norm of the whole gradient is known only then, so a
third pass copies weights, gradients and optimizer state in pieces to the card, updates them there and copies them back.
In bf16 with Muon, 10 bytes per parameter travel to the card and 6 back, once per step whatever the number of tokens.

The cards of one machine share the work in one of three ways. `data`: each takes a part of the tokens and reads all
weights; the update is divided. `layers`: each has every c-th layer, and micro-batches go from card to card, so each
weight is read once; where a card's part of the weights fits into its memory, it stays there. `experts`: each has a part
of the experts of every layer, to which tokens travel, and all cards read the rest.

Between machines, each has consecutive layers, and only hidden states pass through the network. The tokens of a step are
then divided into groups that go through the machines one after the other; every group reads the weights again.

Letters: c cards, b machines.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.families import FamilyName
from moedisco_ray.core.limits import STEP_ELEMENTS
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.memory import compute_bytes, micro_batch_sequences
from moedisco_ray.plan.muon_flops import muon_flops
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.plan.timeline import Link, Task, timeline

Division = Literal["data", "layers", "experts"]
"""How the cards of one machine share the work of a step."""
DIVISIONS: tuple[Division, ...] = ("data", "layers", "experts")
_GROUPS = tuple(2**power for power in range(8))
"""Numbers of groups of tokens that are tried between machines."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine whose memory holds weights and optimizer state.

    Attributes:
        alone: Speed of copies between the memory and one card, in one direction (bytes/s).
        both: Speed of each direction while both are used (bytes/s).
        all_cards: Speed of all copies of all cards together, by the links between processor and cards (bytes/s).
        memory_speed: Speed of all copies together, by the host's memory (bytes/s).
        memory_gb: Size of the host's memory (GiB).
    """

    alone: float
    both: float
    all_cards: float
    memory_speed: float
    memory_gb: float

    def link(self, cards: int) -> Link:
        """The link of one card while a number of cards copy at the same time."""
        share = min(self.all_cards, self.memory_speed) / cards
        return Link(min(self.alone, share), min(self.both, share / 2))


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a training step.

    Attributes:
        tokens: Tokens of the step.
        micro_batch: Tokens of a micro-batch.
        layers: Number of decoder layers.
        layer: Parameters of a layer, on average.
        experts: Parameters of a layer's experts.
        ends: Parameters of the embedding, and of the head if it is not tied.
        head: Parameters in the matrix product of the head.
        layer_flops: Operations of a layer's forward pass per token, on average.
        update_flops: Operations of Muon in one update of all matrices.
        weight: Bytes per weight, and per gradient.
        state: Bytes of the optimizer's state per parameter, on average.
        hidden: Bytes of one token's hidden state.
        selected: Bytes that travel to a token's experts in one layer.
    """

    tokens: int
    micro_batch: int
    layers: int
    layer: float
    experts: float
    ends: int
    head: int
    layer_flops: float
    update_flops: float
    weight: int
    state: float
    hidden: int
    selected: float

    @property
    def parameters(self) -> float:
        """All parameters."""
        return self.layers * self.layer + self.ends

    @property
    def flops(self) -> float:
        """Operations of a step in which each layer is computed again in the backward pass."""
        return 4 * self.tokens * (self.layers * self.layer_flops + 2 * self.head) + self.update_flops

    @property
    def host_bytes(self) -> float:
        """Host memory for weights, gradients, optimizer state, and the inputs of each layer."""
        return self.parameters * (2 * self.weight + self.state) + self.tokens * self.hidden * (self.layers + 1)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The time of a streamed step.

    Attributes:
        seconds: Time of the step (s).
        resident: Time if nothing had to be copied, with the same recomputation, divided evenly among all cards (s).
        to_card: Bytes copied to each card.
        to_host: Bytes copied from each card.
    """

    seconds: float
    resident: float
    to_card: float
    to_host: float

    @property
    def kept(self) -> float:
        """Share of the speed of training without copies that is kept."""
        return self.resident / self.seconds


def step_work(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
) -> Work:
    """The work of a training step of a model."""
    parameters = count_parameters(family, architecture, vocab_size)
    layers, hidden = architecture.num_hidden_layers, architecture.hidden_size
    tokens = max(1, optimizer.batch_tokens // sequence_length) * sequence_length
    weight, width = 2 if optimizer.state == "bf16" else 4, compute_bytes(optimizer, gpu)
    forward = flops_per_token(parameters, architecture, sequence_length, checkpointing=False) / 3
    head, ends = vocab_size * hidden, parameters.embedding + parameters.head
    by_muon = parameters.matrices if optimizer.name == "muon" else 0
    moments = 2 * (1 if optimizer.moments == "fp8" else weight)
    return Work(
        tokens=tokens,
        micro_batch=micro_batch_sequences(optimizer, sequence_length, 1) * sequence_length,
        layers=layers,
        layer=(parameters.total - ends) / layers,
        experts=parameters.experts / layers,
        ends=ends,
        head=head,
        layer_flops=(forward - 2 * head) / layers,
        update_flops=muon_flops(family, architecture) if by_muon else 0.0,
        weight=weight,
        state=moments - weight * by_muon / parameters.total,
        hidden=hidden * (4 if weight == 4 else width),
        selected=architecture.num_experts_per_tok * hidden * width,
    )


def step_time(
    work: Work, flops: float, host: Host, *, cards: int = 1, division: Division = "data", kept_gb: float = 0.0
) -> StepTime:
    """The time of a step on the cards of one machine.

    Args:
        work: The step.
        flops: Operations per second of one card.
        host: The machine.
        cards: Number of cards.
        division: How the cards share the work.
        kept_gb: Memory of a card for weights that stay there (GiB); only `layers` uses it.
    """
    found = timeline(step_tasks(work, flops, cards=cards, division=division, kept_gb=kept_gb), host.link(cards))
    # With divided layers, cards wait for the first micro-batches and the last ones, in both passes; with fewer
    # micro-batches than cards, they also wait in each round of layers.
    micro_batch = min(work.micro_batch, work.tokens)
    missing = max(0, cards - math.ceil(work.tokens / micro_batch))
    steps_idle = cards - 1 + missing * (math.ceil(work.layers / cards) - 1)
    waiting = steps_idle * 4 * work.layer_flops * micro_batch / flops
    return StepTime(
        found.seconds + (waiting if division == "layers" else 0.0),
        work.flops / flops / cards,
        found.copied_in,
        found.copied_out,
    )


def step_tasks(
    work: Work, flops: float, *, cards: int = 1, division: Division = "data", kept_gb: float = 0.0
) -> list[Task]:
    """The tasks of one card in a step; see `step_time`."""
    stays = division == "layers" and work.parameters * work.weight / cards <= kept_gb * 2**30
    share = _share(work, cards, division, stays=stays)
    return [*_forward(work, share, flops), *_backward(work, share, flops), *_update(work, share, flops)]


def best_step(work: Work, flops: float, host: Host, *, cards: int, kept_gb: float = 0.0) -> tuple[Division, StepTime]:
    """The fastest way to divide a step among the cards of one machine, and its time."""
    times = {each: step_time(work, flops, host, cards=cards, division=each, kept_gb=kept_gb) for each in DIVISIONS}
    chosen = min(times, key=lambda each: times[each].seconds)
    return chosen, times[chosen]


def step_between_hosts(work: Work, flops: float, host: Host, *, hosts: int, network: float) -> StepTime:
    """The time of a step whose layers are divided among machines with one card each.

    The machine with the head is assumed to have fewer layers, so that all compute equally long.

    Args:
        work: The step.
        flops: Operations per second of one card.
        host: Each of the machines.
        hosts: Number of machines, b.
        network: Speed of the network between two machines, each way (bytes/s).
    """
    link, times = host.link(1), []
    for groups in _GROUPS:
        part = dataclasses.replace(
            work,
            tokens=work.tokens // groups,
            layers=-(-work.layers // hosts),
            ends=work.ends // hosts,
            head=work.head // hosts,
            update_flops=work.update_flops / hosts,
        )
        share = _share(part, 1, "data", stays=False)
        sent = part.tokens * part.hidden / network
        update = timeline([dataclasses.replace(task, after=None) for task in _update(part, share, flops)], link)
        # Every group but the first adds its gradients to those of the group before.
        added = part.layer * part.weight if groups > 1 else 0.0
        backward = [
            dataclasses.replace(task, after=None, copied_in=task.copied_in + added)
            for task in _backward(part, share, flops)
        ]
        passes = [timeline(_forward(part, share, flops), link), timeline(backward, link)]
        seconds = update.seconds + (groups + hosts - 1) * sum(max(each.seconds, sent) for each in passes)
        times.append(
            StepTime(
                seconds,
                work.flops / flops / hosts,
                update.copied_in + groups * sum(each.copied_in for each in passes),
                update.copied_out + groups * sum(each.copied_out for each in passes),
            )
        )
    return min(times, key=lambda each: each.seconds)


@dataclasses.dataclass(frozen=True)
class _Share:
    """One card's part of a step.

    Attributes:
        tokens: Tokens that pass through the card's part of a layer.
        own_tokens: Tokens whose embedding and loss the card computes.
        layers: Number of layers that the card computes.
        layer: Parameters of a layer that the card reads.
        alone: Parameters of a layer whose gradient only this card computes.
        shared: Parameters of a layer that this card updates of those whose gradient all cards compute.
        ends: Parameters of the embedding and the head that this card updates.
        sent: Bytes of hidden states that the card sends in each layer, and receives.
        arithmetic: Operations of Muon in the update of a layer.
        stays: Whether the weights of the card's layers stay on the card.
    """

    tokens: float
    own_tokens: float
    layers: int
    layer: float
    alone: float
    shared: float
    ends: float
    sent: float
    arithmetic: float
    stays: bool


def _share(work: Work, cards: int, division: Division, *, stays: bool) -> _Share:
    own_tokens = work.tokens / cards
    tokens = work.tokens if division == "layers" else own_tokens
    layers = -(-work.layers // cards) if division == "layers" else work.layers
    experts = work.experts / cards if division == "experts" else work.experts
    layer = work.layer - work.experts + experts
    alone = {"data": 0.0, "layers": layer, "experts": experts}[division]
    sent = {
        "data": 0.0,
        "layers": tokens * work.hidden * (cards > 1),
        "experts": 2 * tokens * work.selected * (1 - 1 / cards),  # to the experts and back
    }[division]
    return _Share(
        tokens=tokens,
        own_tokens=own_tokens,
        layers=layers,
        layer=layer,
        alone=alone,
        shared=(layer - alone) / cards,
        ends=work.ends / cards,
        sent=sent,
        arithmetic=work.update_flops / cards / layers,
        stays=stays,
    )


def _forward(work: Work, share: _Share, flops: float) -> list[Task]:
    """The embedding, then the layers; the inputs of each layer go to the host."""
    kept = share.tokens * work.hidden
    read = 0.0 if share.stays else share.layer * work.weight
    # Of divided layers, the inputs that are kept are those that the card receives.
    sent = share.sent if share.sent and share.alone == share.layer else share.sent + kept
    layer = Task(share.tokens * work.layer_flops / flops, read + share.sent, sent)
    return [Task(0.0, work.ends / 2 * work.weight, share.own_tokens * work.hidden), *[layer] * share.layers]


def _backward(work: Work, share: _Share, flops: float) -> list[Task]:
    """The head, which computes the loss too, then the layers from the last to the first, then the embedding."""
    end = work.ends / 2 * work.weight
    kept = share.tokens * work.hidden
    read = 0.0 if share.stays else share.layer * work.weight
    sent = share.sent * (2 if share.tokens < work.tokens else 1)  # experts get a recomputed layer's tokens again
    computing = 3 * share.tokens * work.layer_flops / flops
    layers = [
        Task(computing, read + kept + sent, share.layer * work.weight + sent, after=share.layers - number)
        for number in range(share.layers)
    ]
    head = Task(8 * share.own_tokens * work.head / flops, end, end)
    return [head, *layers, Task(0.0, share.own_tokens * work.hidden, end)]


def _update(work: Work, share: _Share, flops: float) -> list[Task]:
    """Updates in pieces, layer by layer from the last one, whose gradients are complete first, then the ends.

    A card that updates parameters whose gradients several cards have computed reads and adds up all of them.
    """
    head = share.layers + 1  # number of the head's task in the backward pass
    updated = share.alone + share.shared
    moved = updated * (work.weight + work.state)
    pieces = max(1, round(updated / STEP_ELEMENTS))
    piece = Task(
        share.arithmetic / flops / pieces,
        (share.layer * work.weight + moved - share.stays * share.layer * work.weight) / pieces,
        moved / pieces,
    )
    layers = [dataclasses.replace(piece, after=head + 1 + number // pieces) for number in range(share.layers * pieces)]
    ends = share.ends * (work.weight + work.state)
    return [*layers, Task(0.0, work.ends * work.weight + ends, ends, after=head + 1 + share.layers)]
