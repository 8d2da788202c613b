"""Refit experts to the routing of a smaller model: its MoE blocks shall compute what those of the whole model compute.

Without some experts, or with a lower top-k, a token has other experts than before. No routing among the experts that
are left makes up for that, but their down projections can: with the routing as it is, a block's output is linear in
them, so that least squares brings it as close as possible to the output of the whole block for the same inputs. The
experts have their turn one after the other, each with what the others leave, a few times. A ridge keeps a projection as
it is where the text says little.

An expert with S tokens and F hidden units costs 2 n m^2 operations for the matrix that is to be solved and m^3 / 3 for
its factors, where m is the smaller of both numbers and n the larger; where the factors are kept, once and not at each
turn.

Shapes: T tokens, S tokens of one expert, D hidden, F expert hidden, K top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.models import ModelMap, expert_hidden

Route = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""A router: logits of all experts, and weights and indices of the selected ones, from the tokens."""
_SWEEPS = 3
_RIDGE = 0.01
"""Strength of the ridge, as a multiple of the mean square of an expert's hidden activations."""
MOST_KEPT = 4 << 30
"""Memory for the factors of a layer's experts (bytes); more are computed again at each turn."""


def routed_outputs(experts: Any, router: Route, x_TD: Tensor) -> Tensor:
    """The weighted sum of the outputs of each token's experts, without a shared expert [T, D]."""
    _, weight_TK, index_TK = router(x_TD)
    found: Tensor = experts(x_TD, index_TK, weight_TK)
    return found


def down_changes(
    experts: Any, router: Route, x_TD: Tensor, target_TD: Tensor, sweeps: int = _SWEEPS
) -> dict[int, Tensor]:
    """What is to be added to the down projection of each expert that has tokens [F, D].

    Args:
        experts: The experts of the smaller model.
        router: Their router, see `run_router`.
        x_TD: Inputs of both.
        target_TD: Outputs of the whole model's experts for these inputs.
        sweeps: How often each expert has its turn.
    """
    _, weight_TK, index_TK = router(x_TD)
    left_TD = (target_TD - experts(x_TD, index_TK, weight_TK)).float()
    changes, kept, room = dict[int, Tensor](), dict[int, Ridge](), MOST_KEPT
    for expert in torch.unique(index_TK).tolist() * sweeps:
        token_S, k_S = (index_TK == expert).nonzero(as_tuple=True)
        hidden_SF = (expert_hidden(experts, expert, x_TD[token_S]) * weight_TK[token_S, k_S, None]).float()
        if expert in changes:
            left_TD[token_S] += hidden_SF @ changes[expert]
        ridge = kept.get(expert) or Ridge.of(hidden_SF)
        if expert not in kept and ridge.factor.nbytes <= room:
            kept[expert], room = ridge, room - ridge.factor.nbytes
        changes[expert] = ridge.solution(hidden_SF, left_TD[token_S])
        left_TD[token_S] -= hidden_SF @ changes[expert]
    return changes


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A ridge regression on the hidden activations of an expert.

    Attributes:
        factor: Cholesky factor of their products: of tokens [S, S] if they are fewer than hidden units, else of these
            [F, F].
    """

    factor: Tensor

    @classmethod
    def of(cls, hidden_SF: Tensor) -> Ridge:
        tokens, units = hidden_SF.shape
        square = (hidden_SF @ hidden_SF.T if tokens < units else hidden_SF.T @ hidden_SF).double()
        strength = _RIDGE * square.diagonal().sum() / units
        square.diagonal().add_(strength.clamp(min=torch.finfo(torch.float64).tiny))
        return cls(torch.linalg.cholesky(square))

    def solution(self, hidden_SF: Tensor, target_SD: Tensor) -> Tensor:
        """The matrix whose product with the activations comes closest to the target [F, D]."""
        if len(hidden_SF) < hidden_SF.shape[1]:
            return hidden_SF.T @ torch.cholesky_solve(target_SD.double(), self.factor).float()
        return torch.cholesky_solve((hidden_SF.T @ target_SD).double(), self.factor).float()


def add_to_down(
    experts: Any, names: ModelMap, layer: int, expert: int, change_FD: Tensor, *, tensors: dict[str, Tensor]
) -> None:
    """Add to the down projection of an expert: in the module, and in the canonical tensors of its layer."""
    stacks, change = names.family.stacks, change_FD if names.family.interleaved else change_FD.T
    key = names.block_key(layer, "experts.down_proj") if stacks else names.expert_key(layer, expert, "down")
    stored = tensors[key][expert] if stacks else tensors[key]
    new = (stored.to(change) + change).to("cpu", stored.dtype)
    if stacks:
        tensors[key][expert] = new
    else:
        tensors[key] = new
    experts.down_proj[expert].copy_(new)
