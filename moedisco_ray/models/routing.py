"""What routers compute from their logits, in the words of a family's declaration.

Shapes: T tokens, E experts, K top-k, G groups of experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moedisco_ray.core.families import Router


def row_inputs(module: nn.Module, x_TD: Tensor, router: Router) -> Tensor:
    """What the rows of a router's experts multiply: its input, or the tanh of its first layer's output.

    Args:
        module: The router.
        x_TD: Inputs of the router.
        router: Declaration of the router.
    """
    return x_TD if router.hidden is None else torch.tanh(x_TD @ module.get_parameter(router.hidden).T)


def scores(logits_TE: Tensor, router: Router) -> Tensor:
    """The router's score of every expert, from which its weight is computed if it is selected."""
    if router.scores == "sparse_mixer":
        return logits_TE
    return torch.sigmoid(logits_TE) if router.scores == "sigmoid" else torch.softmax(logits_TE, dim=-1)


def probabilities(logits_TE: Tensor, router: Router) -> Tensor:
    """The scores of all experts, scaled to sum to one, or a softmax; used for load balance and entropy."""
    if router.scores == "sigmoid":
        found_TE = scores(logits_TE, router)
        return found_TE / found_TE.sum(dim=-1, keepdim=True)
    return torch.softmax(logits_TE, dim=-1)


def log_probabilities(logits_TE: Tensor, router: Router) -> Tensor:
    if router.scores == "sigmoid":
        log_TE = torch.nn.functional.logsigmoid(logits_TE)
        return log_TE - log_TE.logsumexp(dim=-1, keepdim=True)
    return torch.log_softmax(logits_TE, dim=-1)


def sparse_mixer(logits_TE: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """The experts that SparseMixer selects without sampling, and their weights (GRIN, arXiv 2409.12136).

    One expert after the other: that with the largest logit l among those left. Its weight is a softmax over those left
    whose logit m is close to l: (l - m) / max(|m|, l) is at most twice the jitter. Most weights are 1 therefore, and
    their sum is up to K.

    Args:
        logits_TE: Logits of the experts.
        top_k: Number of selected experts, K.
        jitter: Half of the largest distance.

    Returns:
        Indices and weights, [T, K].
    """
    left_TE, found = logits_TE, []
    for _ in range(top_k):
        best_T1, index_T1 = left_TE.max(dim=-1, keepdim=True)
        is_far_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2 * jitter
        weight_T1 = left_TE.masked_fill(is_far_TE, -torch.inf).softmax(dim=-1).gather(-1, index_T1)
        found.append((index_T1, weight_T1))
        left_TE = left_TE.scatter(-1, index_T1, -torch.inf)
    index, weight = zip(*found, strict=True)
    return torch.cat(index, dim=-1), torch.cat(weight, dim=-1)


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a layer's router selects experts by their scores.

    Attributes:
        top_k: Number of selected experts, K.
        groups: Number of groups of experts, and of those that a token may use; None: all experts compete.
        compared: Scores of a group that are summed to compare it with others.
        jitter: What `sparse_mixer` needs; None: a weight is the score.
    """

    top_k: int
    groups: tuple[int, int] | None
    compared: int
    jitter: float | None = None

    @classmethod
    def of(cls, router: Router, fields: Mapping[str, Any]) -> Selection:
        """The selection of a model with these configuration fields."""
        jitter = None if router.jitter_field is None else float(fields[router.jitter_field])
        return cls(int(fields[router.top_k_field]), router.groups(fields), router.least_in_group, jitter)

    def __call__(self, scores_TE: Tensor, correction_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The selected experts of every token, and their scores, or their weights if the scores are logits.

        Args:
            scores_TE: Scores of the experts.
            correction_E: Bias of the scores for the selection only.

        Returns:
            Indices and scores, [T, K].
        """
        if self.jitter is not None:
            return sparse_mixer(scores_TE, min(self.top_k, scores_TE.shape[-1]), self.jitter)
        choice_TE = scores_TE if correction_E is None else scores_TE + correction_E
        if self.groups is not None and self.groups[0] > self.groups[1]:
            count, allowed = self.groups
            best_TG = choice_TE.view(*choice_TE.shape[:-1], count, -1).topk(self.compared, dim=-1).values.sum(-1)
            open_TG = torch.zeros_like(best_TG).scatter(-1, best_TG.topk(allowed, dim=-1).indices, 1.0).bool()
            closed_TE = ~open_TG.repeat_interleave(choice_TE.shape[-1] // count, dim=-1)
            choice_TE = choice_TE.masked_fill(closed_TE, -torch.inf)
        index_TK = choice_TE.topk(min(self.top_k, choice_TE.shape[-1]), dim=-1).indices
        return index_TK, scores_TE.gather(-1, index_TK)
