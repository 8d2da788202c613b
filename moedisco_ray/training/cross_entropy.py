"""Cross-entropy of a language model from its last hidden states, without the logits of all tokens at once.

Logits are computed in tiles of some tokens and some words of the vocabulary, once for the loss and again for its
gradients, as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009), but with
plain matrix products. If a tile holds all words, it gives loss and gradients at once, as in Hsu et al. 2024, "Liger
Kernel" (arXiv 2410.10989). Everything after a product is fp32. (`torch.nn.functional.linear_cross_entropy` returns the
sum in the dtype of the product, which has three significant digits in bf16, and adds up the head's gradient in that
dtype, chunk by chunk.)

Axes: T tokens, V vocabulary, D hidden size; t and v are the tokens and words of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from moedisco_ray.core.limits import LOGITS_BYTES

_BYTES_PER_LOGIT = 16
"""Memory per logit (bytes): in fp32, in the matrix product's dtype, a temporary copy, and the gradient in the product's
dtype."""
TILE_TOKENS = 2_048
"""Maximum tokens of a tile. With more tokens, a tile has too few words for a fast matrix product."""
LEAST_TOKENS = 256
"""Minimum tokens of a tile with all words. With fewer, adding up the head's gradient takes longer than a product."""
_IGNORED = -100


def summed_cross_entropy(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Cross-entropy in nats, summed over all tokens.

    A batch whose logits fit into `LOGITS_BYTES` is computed at once.

    Args:
        hidden_TD: Outputs of the model's last norm, of any floating-point dtype.
        head_VD: Weight of the output head.
        targets_T: Token that follows each position; -100 excludes a position.
        bias_V: Bias of the output head; None: it has none.
    """
    if len(hidden_TD) * len(head_VD) * _BYTES_PER_LOGIT <= LOGITS_BYTES:
        return cross_entropy(linear(hidden_TD, head_VD, bias_V).float(), targets_T, reduction="sum")
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    with torch.autocast(device, enabled=False):
        function = _OnePass if _tile_shape(len(hidden_TD), len(head_VD))[1] == len(head_VD) else _TwoPasses
        loss: Tensor = function.apply(hidden_TD, head_VD, targets_T, dtype, bias_V)  # type: ignore[no-untyped-call]
    return loss


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, dtype: torch.dtype, bias_V: Tensor | None
    ) -> Tensor:
        needs_hidden, needs_head, _, _, needs_bias = ctx.needs_input_grad
        hidden_gradient_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        sum_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        sum_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and needs_bias else None
        losses = []
        for tokens, _, logits_tV, hidden_tD, factor_VD in _tiles(hidden_TD, head_VD, dtype, bias_V):
            counted_t1 = (targets_T[tokens, None] != _IGNORED).float()
            column_t1 = targets_T[tokens, None].clamp(min=0)
            logit_t1 = logits_tV.gather(1, column_t1)
            largest_t1 = logits_tV.amax(dim=1, keepdim=True)
            sum_t1 = logits_tV.sub_(largest_t1).exp_().sum(dim=1, keepdim=True)
            losses.append((counted_t1 * (largest_t1 + sum_t1.log() - logit_t1)).sum())
            gradient_tV = logits_tV.mul_(counted_t1 / sum_t1).scatter_add_(1, column_t1, -counted_t1).to(dtype)
            if hidden_gradient_TD is not None:
                hidden_gradient_TD[tokens] = gradient_tV @ factor_VD
            if sum_VD is not None:
                sum_VD += gradient_tV.T @ hidden_tD
            if sum_V is not None:
                sum_V += gradient_tV.sum(dim=0, dtype=torch.float32)
        ctx.save_for_backward(
            hidden_gradient_TD, *(None if each is None else each.to(head_VD.dtype) for each in (sum_VD, sum_V))
        )
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient_TD, head_gradient_VD, bias_gradient_V = (
            None if each is None else each * gradient for each in ctx.saved_tensors
        )
        return hidden_gradient_TD, head_gradient_VD, None, None, bias_gradient_V


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, dtype: torch.dtype, bias_V: Tensor | None
    ) -> Tensor:
        log_partition_T = hidden_TD.new_full((len(hidden_TD),), -torch.inf, dtype=torch.float32)
        logit_T = torch.zeros_like(log_partition_T)  # logit of the target
        for tokens, words, logits_tv, _, _ in _tiles(hidden_TD, head_VD, dtype, bias_V):
            log_partition_T[tokens] = torch.logaddexp(log_partition_T[tokens], logits_tv.logsumexp(dim=1))
            column_t, inside_t = _columns(targets_T[tokens], words)
            logit_T[tokens] += torch.where(inside_t, logits_tv.gather(1, column_t[:, None])[:, 0], 0)
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, log_partition_T, bias_V)
        ctx.dtype = dtype
        return torch.where(targets_T == _IGNORED, 0, log_partition_T - logit_T).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, head_VD, targets_T, log_partition_T, bias_V = ctx.saved_tensors
        weight_T = torch.where(targets_T == _IGNORED, 0, gradient)
        needs_hidden, needs_head, _, _, needs_bias = ctx.needs_input_grad
        hidden_gradient_TD = torch.zeros_like(hidden_TD, dtype=torch.float32) if needs_hidden else None
        head_gradient_VD = torch.empty_like(head_VD) if needs_head else None
        sum_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        sum_vD = torch.empty(0)
        for tokens, words, logits_tv, hidden_tD, head_vD in _tiles(hidden_TD, head_VD, ctx.dtype, bias_V):
            # The gradient of the logits is softmax - one-hot target.
            gradient_tv = logits_tv.sub_(log_partition_T[tokens, None]).exp_()
            column_t, inside_t = _columns(targets_T[tokens], words)
            gradient_tv.scatter_add_(1, column_t[:, None], -inside_t.float()[:, None])
            gradient_tv = gradient_tv.mul_(weight_T[tokens, None]).to(ctx.dtype)
            if hidden_gradient_TD is not None:
                hidden_gradient_TD[tokens] += gradient_tv @ head_vD
            if sum_V is not None:
                sum_V[words] += gradient_tv.sum(dim=0, dtype=torch.float32)
            if head_gradient_VD is None:
                continue
            part_vD = (gradient_tv.T @ hidden_tD).float()
            sum_vD = part_vD if tokens.start == 0 else sum_vD.add_(part_vD)
            if tokens.stop == len(hidden_TD):
                head_gradient_VD[words] = sum_vD
        hidden_gradient_TD = None if hidden_gradient_TD is None else hidden_gradient_TD.to(hidden_TD.dtype)
        return hidden_gradient_TD, head_gradient_VD, None, None, None if sum_V is None else sum_V.to(head_VD.dtype)


def _tiles(
    hidden_TD: Tensor, head_VD: Tensor, dtype: torch.dtype, bias_V: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Yield each tile's tokens and words, logits [t, v] in fp32, and the factors of the product, by words."""
    count, vocabulary = len(hidden_TD), len(head_VD)
    rows, columns = _tile_shape(count, vocabulary)
    for first_word in range(0, vocabulary, columns):
        words = slice(first_word, min(first_word + columns, vocabulary))
        head_vD = head_VD[words].to(dtype)
        bias_v = None if bias_V is None else bias_V[words].to(dtype)
        for first_token in range(0, count, rows):
            tokens = slice(first_token, min(first_token + rows, count))
            hidden_tD = hidden_TD[tokens].to(dtype)
            logits_tv = linear(hidden_tD, head_vD, bias_v)
            yield tokens, words, logits_tv.float(), hidden_tD, head_vD


def _tile_shape(count: int, vocabulary: int) -> tuple[int, int]:
    """Maximum tokens and words of a tile."""
    logits = LOGITS_BYTES // _BYTES_PER_LOGIT
    if logits >= vocabulary * LEAST_TOKENS:
        return min(count, TILE_TOKENS, logits // vocabulary), vocabulary
    rows = min(count, TILE_TOKENS)
    return rows, min(vocabulary, max(1, logits // rows))


def _columns(targets_t: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in a tile, and whether the tile has this target; if it does not, the column is 0."""
    column_t = targets_t - words.start
    inside_t = (column_t >= 0) & (targets_t < words.stop)
    return torch.where(inside_t, column_t, 0), inside_t
