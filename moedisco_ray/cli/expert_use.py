"""Which experts compute the tokens of an answer.

Shapes: T tokens of a forward pass, K selected experts, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.hf import moe_blocks
from moedisco_ray.stages.export.modeling_ensemble import EnsembleForCausalLM

_MOST_NAMED = 4
"""Maximum number of experts to name per token."""


class ExpertUse:
    """Records which experts each token selects while the context is active.

    An expert's share of a token is its routing weight, as a part of all weights of the token in a layer, averaged over
    the MoE layers.

    Args:
        model: A model that generates one sequence at a time.

    Raises:
        ConfigError: The model is dense, or an ensemble.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if isinstance(model, EnsembleForCausalLM):
            raise ConfigError("--experts", None, "all of the sub-models compute each token; leave the option out")
        self._experts = {layer: block.get_submodule("experts") for layer, block in moe_blocks(model).items()}
        if not self._experts:
            raise ConfigError("--experts", None, "the model is dense; leave the option out")
        self._layers: list[list[tuple[Tensor, Tensor]]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._layers = [[] for _ in self._experts]
        self._hooks = [
            experts.register_forward_pre_hook(self._record(passes))
            for experts, passes in zip(self._experts.values(), self._layers, strict=True)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def shares(self) -> Tensor:
        """The shares of all recorded tokens [T, E]; each row sums to 1."""
        computed = min(map(len, self._layers))  # Ctrl-C can end a forward pass between two layers
        count = max(int(experts.num_experts) for experts in self._experts.values())  # type: ignore[arg-type]
        if not computed:
            return torch.empty(0, 0)
        return torch.stack([_shares_of_passes(passes[:computed], count) for passes in self._layers]).mean(0)

    def _record(self, passes: list[tuple[Tensor, Tensor]]) -> Any:
        def hook(_experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            passes.append((inputs[1], inputs[2]))

        return hook


def _shares_of_passes(passes: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    return torch.cat([_shares(expert_TK, weight_TK, count) for expert_TK, weight_TK in passes])


def _shares(expert_TK: Tensor, weight_TK: Tensor, count: int) -> Tensor:
    used_TE = torch.zeros(len(expert_TK), count)
    used_TE.scatter_add_(1, expert_TK.cpu(), weight_TK.float().cpu())
    return used_TE / used_TE.sum(1, keepdim=True)


def use_lines(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], shares_TE: Tensor) -> list[str]:
    """One line per token with the experts that it uses most, and one for all tokens.

    Args:
        tokenizer: The model's tokenizer.
        ids: Token ids of the answer; later ones that the model has not read yet are left out.
        shares_TE: Each expert's share of each of the tokens.
    """
    texts = [repr(tokenizer.decode([token])) for token in ids[: len(shares_TE)]]
    if not texts:
        return []
    width = max(map(len, texts))
    lines = [f"{text:>{width}}  {_named(share_E)}" for text, share_E in zip(texts, shares_TE, strict=True)]
    return [*lines, f"{'all':>{width}}  {_named(shares_TE.mean(0))}"]


def _named(share_E: Tensor) -> str:
    shares, experts = share_E.topk(min(_MOST_NAMED, len(share_E)))
    return "  ".join(
        f"{expert}: {share:.0%}" for share, expert in zip(shares.tolist(), experts.tolist(), strict=True) if share
    )
