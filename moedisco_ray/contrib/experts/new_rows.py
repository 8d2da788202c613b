"""Rows of a router for experts that were trained elsewhere; the experts that the router knows keep their rows.

The mean of the known rows gives each token the mean of its logits. A new row is this mean plus s times a direction that
points from the model's own text to the new expert's text, so that a token of the own text stays with the experts that
it had.

Shapes: T tokens, D hidden, E experts, K top-k, N new experts, C = N + 1 clusters: the model's own text, and that of
each new expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from moedisco_ray.core.families import Router
from moedisco_ray.models import scores

_SHARE = 0.9
"""Share of the tokens on the right side of a direction for which s is large enough. The others are close to the border,
where an s that is large enough would have no limit."""

Inputs = Iterable[tuple[Tensor, Tensor]]
"""Inputs x_TD of a router, and the cluster of each token."""


def new_rows(
    rows_ED: Tensor,
    bias_E: Tensor | float,
    direction_CD: Tensor,
    inputs: Inputs,
    *,
    router: Router,
    top_k: int,
    correction_E: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The rows of new experts.

    s is the least with which most tokens of a new text prefer its expert to all known ones, and most tokens of the own
    text prefer K known experts to all new ones.

    Args:
        rows_ED: Rows of the known experts.
        bias_E: Their biases.
        direction_CD: A direction for each cluster; a token's largest product is that with the direction of its own
            cluster.
        inputs: Calibration data.
        router: The family's router.
        top_k: Number of experts per token.
        correction_E: The known experts' corrections of the scores, whose mean the new experts have; None: there are
            none.

    Returns:
        The rows [N, D], and s.
    """
    toward_ND = direction_CD[1:] - direction_CD[0]
    needed = [torch.zeros(1, dtype=torch.float64, device=rows_ED.device)]
    for input_TD, cluster_T in inputs:
        x_TD = input_TD.to(rows_ED.device, torch.float64)
        logits_TE = x_TD @ rows_ED.T + bias_E
        tied_TE = logits_TE if correction_E is None else _tied(logits_TE, correction_E, router)
        best_TK = (tied_TE - logits_TE.mean(dim=1, keepdim=True)).topk(min(top_k, len(rows_ED)), dim=1).values
        toward_TN = x_TD @ toward_ND.T
        is_new_T, own_TN = cluster_T > 0, toward_TN.gather(1, (cluster_T[:, None] - 1).clamp(min=0))
        distance_T = torch.where(is_new_T, best_TK[:, 0], -best_TK[:, -1])
        margin_T = torch.where(is_new_T, own_TN[:, 0], -toward_TN.amax(dim=1))
        right_T = margin_T > 0
        needed.append((distance_T[right_T] / margin_T[right_T]).clamp(min=0))
    needed_T = torch.cat(needed)
    scale = float(needed_T[needed_T.isfinite()].quantile(_SHARE))  # a correction can decide alone, whatever the scale
    return rows_ED.mean(dim=0) + scale * toward_ND, scale


def _tied(logits_TE: Tensor, correction_E: Tensor, router: Router) -> Tensor:
    """Logits at which an expert of mean correction is as good a choice as each expert; they may be infinite."""
    score_TE = (scores(logits_TE, router) + correction_E - correction_E.mean()).clamp(0.0, 1.0)
    return score_TE.logit() if router.scores == "sigmoid" else score_TE.log() + logits_TE.logsumexp(dim=1, keepdim=True)


def use_of_new(select: Callable[[Tensor], Tensor], new: Sequence[int], inputs: Inputs) -> list[float]:
    """Share of each cluster's tokens that use a new expert.

    For the model's own text, any new expert counts; for a new text, the expert of this text.

    Args:
        select: Returns the experts [T, K] that the router selects for its inputs x_TD.
        new: Numbers of the new experts.
        inputs: Calibration data.
    """
    used_C, tokens_C = torch.zeros(2, len(new) + 1, dtype=torch.float64)
    for input_TD, cluster_T in inputs:
        index_TK = select(input_TD)
        uses_TN = torch.stack([(index_TK == expert).any(dim=1) for expert in new], dim=1)
        uses_TC = torch.cat([uses_TN.any(dim=1, keepdim=True), uses_TN], dim=1)
        used_C += torch.zeros_like(used_C).index_add(
            0, cluster_T.cpu(), uses_TC.gather(1, cluster_T[:, None])[:, 0].double().cpu()
        )
        tokens_C += torch.bincount(cluster_T.cpu(), minlength=len(tokens_C))
    return (used_C / tokens_C).tolist()
