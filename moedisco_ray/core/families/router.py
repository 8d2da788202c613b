"""How a family's router selects and weights experts, and how the router of a sub-model is configured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Router:
    """A router: logits of all experts, scores from the logits, the k best experts, and their weights from their scores.

    Attributes:
        module: Name of the router in the MoE block.
        weight: Name of the matrix of all experts' rows in the router.
        scores: Function from logits to scores; `sparse_mixer`: the logits are the scores, see
            `models.routing.sparse_mixer`.
        normalises: Whether the weights of the selected experts are scaled to sum to one: by the setting
            `norm_topk_prob`, or regardless of it.
        bias: Name of the bias of the logits in the router; None: there is none.
        correction: Name of the bias that is added to the scores for the selection only (DeepSeek-V3, arXiv 2412.19437,
            section 2.1.2), which no gradient trains; None: there is none.
        correction_of_block: Whether this bias belongs to the MoE block, which gives it to the router.
        correction_axis: The axis of this bias that counts experts; axes before it have size 1.
        hidden: Name of the router's first layer, which all experts share and which belongs to the backbone: the rows of
            the experts multiply the tanh of its output. None: they multiply the router's input.
        hidden_size_field: Configuration field with the size of the first layer's output; by default it is the number of
            experts.
        noise: Name of the weights of a noise in training that is left out here, so that no gradient trains them; None:
            there are none.
        top_k_field: Configuration field with the number of experts per token.
        only_top_k: Number of experts per token that transformers selects whatever the configuration says; None: as
            configured.
        jitter_field: Configuration field with the half of the relative distance from the largest logit at which
            `sparse_mixer` leaves an expert out of a softmax; None: there is none.
        scaling_field: Configuration field with a factor on all weights; None: there is none.
        limits_groups: Whether experts are selected from the best `topk_group` of `n_group` groups.
        limit_field: Configuration field and value that switch the limit on; None: it is always on.
        in_fp32: Whether logits are computed in fp32 even if the model is in bf16.
        weights_in_fp32: Whether the weights of the selected experts are in fp32 even if the model is in bf16.
        without_autocast: Whether logits are computed in fp32 under autocast too.
        least_in_group: Experts that transformers needs in every group, to compare groups by the sum of their best
            scores, or to select as many.
    """

    module: str = "gate"
    weight: str = "weight"
    scores: Literal["softmax", "sigmoid", "sparse_mixer"] = "softmax"
    normalises: Literal["always", "never", "by_setting"] = "by_setting"
    bias: str | None = None
    correction: str | None = None
    correction_of_block: bool = False
    correction_axis: int = 0
    hidden: str | None = None
    hidden_size_field: str | None = None
    noise: str | None = None
    top_k_field: str = "num_experts_per_tok"
    only_top_k: int | None = None
    jitter_field: str | None = None
    scaling_field: str | None = None
    limits_groups: bool = False
    limit_field: tuple[str, str] | None = None
    in_fp32: bool = False
    weights_in_fp32: bool = False
    without_autocast: bool = False
    least_in_group: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the router's tensors in memory; each has an axis of experts."""
        return (self.weight, *filter(None, (self.bias, *self.untrained)))

    @property
    def untrained(self) -> tuple[str, ...]:
        """Names of the tensors that no gradient trains."""
        return tuple(filter(None, (self.correction, self.noise)))

    def in_block(self, name: str) -> str:
        """Name in memory, relative to the MoE block, of one of the router's tensors."""
        return name if self.correction_of_block and name == self.correction else f"{self.module}.{name}"

    def hidden_size(self, fields: Mapping[str, Any], experts: int) -> int:
        """Size of the first layer's output; 0 without such a layer.

        Args:
            fields: Configuration fields of the model.
            experts: Routed experts of a layer.
        """
        return 0 if self.hidden_size_field is None else int(fields.get(self.hidden_size_field) or experts)

    def kept_fields(self, fields: Mapping[str, Any], experts: int) -> dict[str, int]:
        """The configuration fields that a model keeps when it gets another number of experts.

        Args:
            fields: Configuration fields of the model.
            experts: Routed experts of a layer, as it is.
        """
        return {} if self.hidden_size_field is None else {self.hidden_size_field: self.hidden_size(fields, experts)}

    def normalised(self, norm_topk_prob: object) -> bool:
        """Whether the weights of the selected experts sum to one, before the scaling.

        Args:
            norm_topk_prob: Value of the configuration field.
        """
        return self.normalises == "always" or (self.normalises == "by_setting" and bool(norm_topk_prob))

    def is_constant_alone(self, norm_topk_prob: object) -> bool:
        """Whether a layer's only expert has the same weight for every token: 1, before the scaling.

        Args:
            norm_topk_prob: Value of the configuration field.
        """
        return self.scores != "sigmoid" or self.normalised(norm_topk_prob)

    def check_top_k(self, top_k: int, experts: int) -> None:
        """Check the number of experts per token.

        Raises:
            ValueError: transformers would select another number of the experts.
        """
        needed = top_k if self.only_top_k is None else min(self.only_top_k, experts)
        if top_k != needed:
            raise ValueError(f"is not {needed}, the number of experts that this router always selects; use {needed}")

    def scaling(self, fields: Mapping[str, Any]) -> float:
        """Factor on all weights of a model with these configuration fields."""
        return 1.0 if self.scaling_field is None else float(fields.get(self.scaling_field) or 1.0)

    def groups(self, fields: Mapping[str, Any]) -> tuple[int, int] | None:
        """Number of groups of experts, and of those that a token may use; None: all experts compete.

        Args:
            fields: Configuration fields of the model.
        """
        if not self.limits_groups or (
            self.limit_field is not None and fields.get(self.limit_field[0]) != self.limit_field[1]
        ):
            return None
        return int(fields.get("n_group") or 1), int(fields.get("topk_group") or 1)

    def submodel_fields(self, fields: Mapping[str, Any], experts: int, kept: int) -> dict[str, int]:
        """The configuration fields that differ in a sub-model with a share of each layer's experts.

        A sub-model has whole groups of experts, or experts of one group.

        Args:
            fields: Configuration fields of the whole MoE, with its `top_k_field`.
            experts: Experts of a layer of the whole MoE.
            kept: Experts of a layer of the sub-model.

        Raises:
            ValueError: The router cannot be divided in this way.
        """
        if experts < self.least_in_group:
            raise ValueError(
                f"divides a model of {experts} expert, but its router needs {self.least_in_group}; add experts"
            )
        top_k = min(int(fields[self.top_k_field]), kept)
        if kept < self.least_in_group and not self.is_constant_alone(fields.get("norm_topk_prob")):
            raise ValueError(
                f"leaves {kept} expert per sub-model, and without norm_topk_prob the router needs "
                f"{self.least_in_group}; use at most {experts // self.least_in_group}"
            )
        groups, kept_fields = self.groups(fields), self.kept_fields(fields, experts)
        if groups is None:
            return {self.top_k_field: top_k, **kept_fields}
        count, allowed = groups
        size = experts // count
        if kept % size and size % kept:
            raise ValueError(
                f"gives sub-models of {kept} experts, which cut the router's groups of {size} experts; "
                f"use {count} or a divisor or a multiple of it"
            )
        own = max(1, kept // size)
        allowed = min(allowed, own)
        return {self.top_k_field: min(top_k, allowed * size), "n_group": own, "topk_group": allowed, **kept_fields}
