"""What routers compute from their logits, in the words of a family's declaration.

Shapes: T tokens, E experts, K top-k, G groups of experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.families import Router


def scores(logits_TE: Tensor, router: Router) -> Tensor:
    """The router's score of every expert, from which its weight is computed if it is selected."""
    return torch.sigmoid(logits_TE) if router.scores == "sigmoid" else torch.softmax(logits_TE, dim=-1)


def probabilities(logits_TE: Tensor, router: Router) -> Tensor:
    """The scores of all experts, scaled to sum to one; load balance and entropy are computed from them."""
    found_TE = scores(logits_TE, router)
    return found_TE / found_TE.sum(dim=-1, keepdim=True) if router.scores == "sigmoid" else found_TE


def log_probabilities(logits_TE: Tensor, router: Router) -> Tensor:
    """Logarithms of `probabilities`."""
    if router.scores == "sigmoid":
        log_TE = torch.nn.functional.logsigmoid(logits_TE)
        return log_TE - log_TE.logsumexp(dim=-1, keepdim=True)
    return torch.log_softmax(logits_TE, dim=-1)


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a layer's router selects experts by their scores.

    Attributes:
        top_k: Number of selected experts, K.
        groups: Number of groups of experts, and of those that a token may use; None: all experts compete.
        compared: Scores of a group that are summed to compare it with others.
    """

    top_k: int
    groups: tuple[int, int] | None
    compared: int

    @classmethod
    def of(cls, router: Router, fields: Mapping[str, Any]) -> Selection:
        """The selection of a model with these configuration fields."""
        return cls(int(fields[router.top_k_field]), router.groups(fields), router.least_in_group)

    def __call__(self, scores_TE: Tensor, correction_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The selected experts of every token, and their scores.

        Args:
            scores_TE: Scores of the experts.
            correction_E: Bias of the scores for the selection only.

        Returns:
            Indices and scores, [T, K].
        """
        choice_TE = scores_TE if correction_E is None else scores_TE + correction_E
        if self.groups is not None and self.groups[0] > self.groups[1]:
            count, allowed = self.groups
            best_TG = choice_TE.view(*choice_TE.shape[:-1], count, -1).topk(self.compared, dim=-1).values.sum(-1)
            open_TG = torch.zeros_like(best_TG).scatter(-1, best_TG.topk(allowed, dim=-1).indices, 1.0).bool()
            closed_TE = ~open_TG.repeat_interleave(choice_TE.shape[-1] // count, dim=-1)
            choice_TE = choice_TE.masked_fill(closed_TE, -torch.inf)
        index_TK = choice_TE.topk(min(self.top_k, choice_TE.shape[-1]), dim=-1).indices
        return index_TK, scores_TE.gather(-1, index_TK)
