"""What a merged router selects on the calibration data.

Shapes: T tokens, D inputs of the rows, E experts, C clusters, g = E / C, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moedisco_ray.core.families import Router
from moedisco_ray.models import Selection, scores


class Measured:
    """Load and accuracy of a merged router on calibration data, and the mean sum of top-k scores in sub-models."""

    def __init__(self, kind: Router, whole: Selection, part: Selection, block: nn.Module, clusters: int) -> None:
        self._kind, self._whole, self._part, self._clusters = kind, whole, part, clusters
        stored = block.state_dict()
        self._bias_E, self.correction_E = (
            None if name is None else stored[kind.in_block(name)].double().flatten()
            for name in (kind.bias, kind.correction)
        )

    @property
    def top_k(self) -> int:
        """Selected experts per token, K."""
        return self._whole.top_k

    def on(self, inputs: Sequence[tuple[Tensor, Tensor]], rows_ED: Tensor, own_ED: Tensor) -> dict[str, Any]:
        """Measure the merged router on these inputs.

        Args:
            inputs: Inputs of the router, and the cluster of each token.
            rows_ED: The merged router's rows.
            own_ED: The router rows that the sub-models trained.
        """
        experts, clusters = len(rows_ED), self._clusters
        group = experts // clusters
        load_E, first_C = (
            torch.zeros(size, dtype=torch.float64, device=rows_ED.device) for size in (experts, clusters)
        )
        tokens, hits, weight_sum, branch_sum = 0, 0, 0.0, 0.0
        for input_TD, cluster_T in inputs:
            x_TD = input_TD.to(rows_ED.device, torch.float64)
            index_TK, weight_TK = self.selected(x_TD, rows_ED)
            load_E += torch.bincount(index_TK.flatten(), minlength=experts)
            first_T = index_TK[:, 0] // group
            first_C += torch.bincount(first_T, minlength=clusters)
            hits += int((first_T == cluster_T).sum())
            tokens += len(x_TD)
            weight_sum += float(weight_TK.sum())
            branch_TCg = scores(self.logits(x_TD, own_ED).view(-1, clusters, group), self._kind)
            branch_Tg = branch_TCg[torch.arange(len(x_TD), device=x_TD.device), cluster_T]
            own_Tg = None if self.correction_E is None else self.correction_E.view(clusters, group)[cluster_T]
            branch_sum += float(self._part(branch_Tg, own_Tg)[1].sum())
        load_E /= load_E.sum()
        return {
            "accuracy": hits / tokens,
            "top1_load_C": (first_C / tokens).tolist(),
            "group_load_C": load_E.view(clusters, group).sum(1).tolist(),
            "load_E": load_E.tolist(),
            "weight_sum": weight_sum / tokens,
            "branch_weight_sum": branch_sum / tokens,
        }

    def selected(self, x_TD: Tensor, rows_ED: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that the router selects with these rows, and their scores [T, K]."""
        return self.selected_by(self.logits(x_TD.to(rows_ED.device, torch.float64), rows_ED))

    def selected_by(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Like `selected`, from the router's logits."""
        return self._whole(scores(logits_TE, self._kind), self.correction_E)

    def logits(self, x_TD: Tensor, rows_ED: Tensor) -> Tensor:
        """The router's logits with these rows, and its biases if it has some."""
        logits_TE = x_TD @ rows_ED.T
        return logits_TE if self._bias_E is None else logits_TE + self._bias_E
