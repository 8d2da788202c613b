"""The update of weights that are in the host's memory: piece by piece on the device, by the optimizer's own arithmetic.

Muon and AdamW each take their parameters in the order of their `step`, and round with random numbers of their own, so
the bits are those of `step`, although AdamW comes first here. A matrix that Muon trains is one piece; a stack of
matrices, and a matrix that AdamW trains, is divided by rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moedisco_ray.core.limits import STEP_ELEMENTS
from moedisco_ray.training.host_copies import Ahead
from moedisco_ray.training.muon import Muon, rows_at_once
from moedisco_ray.training.optimizer import RoundingAdamW
from moedisco_ray.training.streamed_cards import Card, Cards

_Piece = tuple[Muon | RoundingAdamW, dict[str, Any], nn.Parameter, slice]
"""Rows of a parameter, with the optimizer and the settings of its update."""
_ROWS = 64
"""Number that divides the rows of a piece, unless it has fewer: vector instructions then divide it evenly."""


def add_states(optimizer: torch.optim.Optimizer) -> None:
    """Give all parameters of an optimizer the state of a training that has made no step, unless they have one."""
    for owner, group in _groups(optimizer):
        for parameter in group["params"]:
            owner.add_state(parameter)


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The optimizer's state, without the numbers of steps."""
    for state in optimizer.state.values():
        yield from (tensor for key, tensor in state.items() if key != "step")


def update(optimizer: torch.optim.Optimizer, factor: Tensor, cards: Cards) -> None:
    """Update every parameter that has a gradient, with the gradient multiplied by a factor.

    Several cards divide the pieces; each card has random numbers of its own.

    Args:
        optimizer: The optimizer; parameters, gradients and state are in the host's memory.
        factor: Factor of all gradients, on a device.
        cards: The devices that compute.
    """
    trained = [
        (owner, group, parameter)
        for owner, group in _groups(optimizer)
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    for _, _, parameter in trained:
        optimizer.state[parameter]["step"] += 1
    pieces = [(*each, rows) for each in trained for rows in _pieces(*each[1:])]
    factors, divided = [factor.to(card.device) for card in cards], _divided(pieces, len(cards))
    cards.each(lambda card: _update_pieces(optimizer, divided[card.number], factors[card.number], card))


def _divided(pieces: Sequence[_Piece], parts: int) -> list[list[_Piece]]:
    """Pieces in parts of about equal work, each part in the order of all: the largest first, each to the least part."""
    cost = [_work(*piece) for piece in pieces]
    part_of, work = [0] * len(pieces), [0] * parts
    for number in sorted(range(len(pieces)), key=lambda number: -cost[number]):
        part_of[number] = work.index(min(work))
        work[part_of[number]] += cost[number]
    found: list[list[_Piece]] = [[] for _ in range(parts)]
    for part, piece in zip(part_of, pieces, strict=True):
        found[part].append(piece)
    return found


def _work(owner: Muon | RoundingAdamW, group: dict[str, Any], parameter: nn.Parameter, rows: slice) -> int:
    """Elements of a piece; of matrices that Muon multiplies, times their smaller side."""
    del group
    elements = (rows.stop - rows.start) * math.prod(parameter.shape[1:])
    return elements * min(parameter.shape[-2:]) if isinstance(owner, Muon) else elements


@torch.no_grad()
def _update_pieces(optimizer: torch.optim.Optimizer, pieces: Sequence[_Piece], factor: Tensor, card: Card) -> None:
    copies = card.copies
    ahead = Ahead(copies, (_tensors(optimizer, parameter, rows) for _, _, parameter, rows in pieces))
    sources: dict[tuple[bool, int], torch.Generator] = {}
    for owner, group, parameter, rows in pieces:
        state = optimizer.state[parameter]
        step = int(state["step"])
        key = (isinstance(owner, Muon), step)
        if key not in sources:
            source = owner.rounding(card.device, step)
            sources[key] = source.manual_seed(source.initial_seed() + card.number)
        near = ahead.take()
        weight, gradient = near.pop("weight"), near.pop("gradient").mul_(factor)
        if isinstance(owner, Muon):
            owner.update_part(weight, gradient, near["exp_avg"], group=group, rounding=sources[key])
        else:
            owner.update_part(group, weight, gradient, near, step=step, source=sources[key])
        copies.send(weight, parameter.detach()[rows])
        for name in near:
            copies.send(near[name], state[name][rows])
        del near, weight, gradient  # their memory is for the piece after the next
        ahead.ask()
    copies.finish()


def _groups(optimizer: torch.optim.Optimizer) -> list[tuple[Muon | RoundingAdamW, dict[str, Any]]]:
    """All parameter groups with the settings of their update, each with the optimizer that updates it."""
    if isinstance(optimizer, Muon):
        optimizer.pass_to_adamw()
        own = [(optimizer, group) for group in optimizer.param_groups if group["halves"] is not None]
        return [*_groups(optimizer.adamw), *own]
    if not isinstance(optimizer, RoundingAdamW):
        raise TypeError(f"{type(optimizer).__name__} does not update parts of tensors")
    return [(optimizer, group) for group in optimizer.param_groups]


def _pieces(group: dict[str, Any], parameter: Tensor) -> Iterator[slice]:
    if group.get("halves"):
        rows = rows_at_once(parameter)
    else:
        rows = STEP_ELEMENTS // max(1, math.prod(parameter.shape[1:]))
        rows = max(1, rows - rows % _ROWS if rows > _ROWS else rows)
    for start in range(0, len(parameter), rows):
        yield slice(start, min(start + rows, len(parameter)))


def _tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: slice) -> dict[str, Tensor]:
    gradient = parameter.grad
    if gradient is None:
        raise ValueError("a parameter has lost its gradient")
    state = {key: tensor[rows] for key, tensor in optimizer.state[parameter].items() if key != "step"}
    return {"weight": parameter.detach()[rows], "gradient": gradient[rows], **state}
