"""Rows of a router for experts that were trained elsewhere; the experts that the router knows keep their rows.

The mean of the known rows gives each token the mean of its logits. A new row is this mean plus s times a direction that points from
the model's own text to the new expert's text, so that a token of the own text stays with the experts that it had.

Shapes: T tokens, D hidden, E experts, K top-k, N new experts, C = N + 1 clusters: the model's own text, and that of each new
expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SHARE = 0.9
"""Share of the tokens on the right side of a direction for which s is large enough. The others are close to the border, where an s
that is large enough would have no limit."""

Inputs = Iterable[tuple[Tensor, Tensor]]
"""Inputs x_TD of a router, and the cluster of each token."""


def new_rows(
    rows_ED: Tensor, bias_E: Tensor | float, direction_CD: Tensor, inputs: Inputs, top_k: int,
) -> tuple[Tensor, float]:
    """The rows of new experts.

    s is the least with which most tokens of a new text prefer its expert to all known ones, and most tokens of the own text prefer
    K known experts to all new ones.

    Args:
        rows_ED: Rows of the known experts.
        bias_E: Their biases.
        direction_CD: A direction for each cluster; a token's largest product is that with the direction of its own cluster.
        inputs: Calibration data.
        top_k: Number of experts per token.

    Returns:
        The rows [N, D], and s.
    """
    toward_ND = direction_CD[1:] - direction_CD[0]
    needed = [torch.zeros(1, dtype=torch.float64, device=rows_ED.device)]
    for input_TD, cluster_T in inputs:
        x_TD = input_TD.to(rows_ED.device, torch.float64)
        logits_TE = x_TD @ rows_ED.T + bias_E
        best_TK = (logits_TE - logits_TE.mean(dim=1, keepdim=True)).topk(min(top_k, len(rows_ED)), dim=1).values
        toward_TN = x_TD @ toward_ND.T
        is_new_T, own_TN = cluster_T > 0, toward_TN.gather(1, (cluster_T[:, None] - 1).clamp(min=0))
        distance_T = torch.where(is_new_T, best_TK[:, 0], -best_TK[:, -1])
        margin_T = torch.where(is_new_T, own_TN[:, 0], -toward_TN.amax(dim=1))
        right_T = margin_T > 0
        needed.append((distance_T[right_T] / margin_T[right_T]).clamp(min=0))
    scale = float(torch.cat(needed).quantile(_SHARE))
    return rows_ED.mean(dim=0) + scale * toward_ND, scale


def use_of_new(rows_ED: Tensor, bias_E: Tensor | float, new: Sequence[int], inputs: Inputs, top_k: int) -> list[float]:
    """Share of the tokens of each cluster that use a new expert: of the own text any, of a new text the expert of this text.

    Args:
        rows_ED: Rows of all experts.
        bias_E: Their biases.
        new: Numbers of the new experts.
        inputs: Calibration data.
        top_k: Number of experts per token.
    """
    used_C, tokens_C = torch.zeros(2, len(new) + 1, dtype=torch.float64)
    for input_TD, cluster_T in inputs:
        logits_TE = input_TD.to(rows_ED.device, torch.float64) @ rows_ED.T + bias_E
        chosen_TE = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(top_k, dim=1).indices, 1.0)
        chosen_TC = torch.cat([chosen_TE[:, list(new)].amax(dim=1, keepdim=True), chosen_TE[:, list(new)]], dim=1)
        used_C += torch.zeros_like(used_C).index_add(0, cluster_T.cpu(), chosen_TC.gather(1, cluster_T[:, None])[:, 0].cpu())
        tokens_C += torch.bincount(cluster_T.cpu(), minlength=len(tokens_C))
    return (used_C / tokens_C).tolist()
