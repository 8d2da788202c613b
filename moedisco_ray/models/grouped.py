"""Products of rows with the matrix of their expert.

torch's grouped product is one kernel on cards of compute capability 9 and 10, in bf16, if all sizes are multiples of 8.
Elsewhere it refuses (other sizes in bf16), or computes one expert after the other: each of the six products of a layer
(two forward, four backward) then copies the experts' offsets to the host, and the CPU waits for the card each time. In
this module the offsets are read once per layer and pass there, and all products use them.

Shapes: S rows, sorted by expert; E experts; A columns of the rows, B columns of the results.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_GROUPED_MM: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm  # noqa: SLF001 - until torch 2.9
_MAJORS = (9, 10)
"""Major compute capabilities for which torch's grouped product has a kernel."""
_ALIGNMENT = 16
"""That kernel needs rows whose size is a multiple of this number (bytes)."""


class Rows:
    """Which rows belong to which expert, if rows are sorted by expert.

    Attributes:
        ends_E: The row after the last one of each expert, int32.

    Args:
        expert_S: The expert of each row, ascending.
        experts: Number of experts.
        counts: Number of rows of each expert; None: it is read from the device when it is needed.
    """

    def __init__(self, expert_S: Tensor, experts: int, counts: Sequence[int] | None = None) -> None:
        every_E = torch.arange(experts, device=expert_S.device)
        # `bincount` and `unique` would wait for the GPU
        self.ends_E = torch.searchsorted(expert_S, every_E, right=True, out_int32=True)
        self._counts = None if counts is None else list(counts)

    @functools.cached_property
    def counts(self) -> list[int]:
        """Number of rows of each expert; without the argument, the CPU waits for the GPU here."""
        if self._counts is not None:
            return self._counts
        return [end - start for start, end in pairwise([0, *self.ends_E.tolist()])]


def grouped_product(x_SA: Tensor, stack_EAB: Tensor, rows: Rows) -> Tensor:
    """Multiply each row with the matrix of its expert, y_SB, in the dtype of autocast or of the matrices.

    Args:
        x_SA: The rows, sorted by expert.
        stack_EAB: The matrices.
        rows: Which rows belong to which expert.
    """
    device = x_SA.device.type
    if torch.is_autocast_enabled(device):  # it does not know these operations
        stack_EAB = stack_EAB.to(torch.get_autocast_dtype(device))
    x_SA = x_SA.to(stack_EAB.dtype)
    if has_kernel(stack_EAB):
        return torchs_product(x_SA, stack_EAB, rows.ends_E)
    return product_in_turn(x_SA, stack_EAB, rows.counts)


def torchs_product(x_SA: Tensor, stack_EAB: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply with torch's function for grouped products."""
    found_SB: Tensor = _GROUPED_MM(x_SA, stack_EAB, offs=ends_E)
    return found_SB


def product_in_turn(x_SA: Tensor, stack_EAB: Tensor, counts: list[int]) -> Tensor:
    """Multiply with one expert after the other."""
    found_SB: Tensor = _InTurn.apply(x_SA, stack_EAB, counts)  # type: ignore[no-untyped-call]  # torch's
    return found_SB


def has_kernel(stack_EAB: Tensor) -> bool:
    """Whether torch multiplies with a stack of matrices in one kernel; on a CPU it needs none."""
    if stack_EAB.device.type != "cuda":
        return True
    return (
        stack_EAB.dtype is torch.bfloat16
        and torch.cuda.get_device_capability(stack_EAB.device)[0] in _MAJORS
        and all(size * stack_EAB.element_size() % _ALIGNMENT == 0 for size in stack_EAB.shape[1:])
    )


class _InTurn(torch.autograd.Function):
    """The products of one expert after the other, in memory that is allocated once for all."""

    @staticmethod
    def forward(ctx: Any, x_SA: Tensor, stack_EAB: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_SA, stack_EAB)
        ctx.counts = counts
        y_SB = x_SA.new_empty(len(x_SA), stack_EAB.shape[2])
        for x_NA, matrix_AB, y_NB in zip(torch.split(x_SA, counts), stack_EAB, torch.split(y_SB, counts), strict=True):
            torch.mm(x_NA, matrix_AB, out=y_NB)
        return y_SB

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SA, stack_EAB = ctx.saved_tensors
        needs_x, needs_stack, _ = ctx.needs_input_grad
        grad_x_SA = torch.empty_like(x_SA) if needs_x else None
        grad_EAB = torch.empty_like(stack_EAB) if needs_stack else None  # with the strides of the stack
        grads = torch.split(grad_SB, ctx.counts)
        if grad_x_SA is not None:
            for grad_NB, matrix_AB, out_NA in zip(grads, stack_EAB, torch.split(grad_x_SA, ctx.counts), strict=True):
                torch.mm(grad_NB, matrix_AB.mT, out=out_NA)
        if grad_EAB is not None:
            for x_NA, grad_NB, out_AB in zip(torch.split(x_SA, ctx.counts), grads, grad_EAB, strict=True):
                torch.mm(x_NA.mT, grad_NB, out=out_AB)
        return grad_x_SA, grad_EAB, None
