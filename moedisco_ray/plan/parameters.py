"""Exact parameter counts per role, from sizes alone.

Letters in formulas: D hidden size, H attention heads, G key-value heads, d size of one head, F hidden size of an
expert, S hidden size of the shared expert, N experts of a layer, V vocabulary.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, computed_field

from moedisco_ray.core.config import Architecture, FamilyName


class Parameters(BaseModel):
    """Number of parameters of a model by role, over all layers.

    A tied head has no parameters of its own, but its matrix product is computed all the same.
    """

    model_config = ConfigDict(frozen=True)

    embedding: int
    attention: int
    norms: int
    router: int
    experts: int
    shared_expert: int
    head: int
    active_experts: int
    """Parameters of the experts that one token passes through."""
    largest_block: int
    """Parameters of the largest part of the model that sharded training gathers at once: a layer, or embedding and head
    together."""
    largest_tensor: int
    """Number of elements of the largest tensor: the embedding, or the stacked gate and up projections of a layer's experts."""

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property; pydantic documents this
    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self._between + self.experts + self.head

    @computed_field  # type: ignore[prop-decorator]  # as above
    @property
    def active(self) -> int:
        """Parameters that one token uses, the embedding table included."""
        return self.embedding + self._between + self.active_experts + self.head

    @property
    def multiplied(self) -> int:
        """Parameters in one token's matrix products, with the head and without the embedding."""
        return self._between + self.active_experts + (self.head or self.embedding)

    @property
    def _between(self) -> int:
        return self.attention + self.norms + self.router + self.shared_expert


def count_parameters(family: FamilyName, architecture: Architecture, vocab_size: int) -> Parameters:
    """Count the parameters of the family's Hugging Face model.

    Per layer: attention 2DHd + 2DGd (and Hd + 2Gd biases in qwen2_moe); norms 2D, plus 2d in qwen3_moe and Hd + Gd in
    olmoe, which normalise queries and keys; router ND; experts 3NDF; in qwen2_moe a shared expert 3DS and its gate D.
    Outside the layers: a last norm D, an embedding VD, and a head VD unless tied.
    """
    hidden, layers = architecture.hidden_size, architecture.num_hidden_layers
    queries = architecture.num_attention_heads * architecture.head_size
    keys = architecture.key_value_heads * architecture.head_size
    attention = 2 * hidden * queries + 2 * hidden * keys
    norms = 2 * hidden
    shared = 0
    if family == "qwen2_moe":
        attention += queries + 2 * keys
        shared = 3 * hidden * shared_hidden_size(family, architecture) + hidden
    elif family == "qwen3_moe":
        norms += 2 * architecture.head_size
    elif family == "olmoe":
        norms += queries + keys
    router = architecture.num_experts * hidden
    expert = 3 * hidden * architecture.moe_intermediate_size
    layer = attention + norms + router + shared + architecture.num_experts * expert
    head = 0 if architecture.tie_word_embeddings else vocab_size * hidden
    return Parameters(
        embedding=vocab_size * hidden,
        attention=layers * attention,
        norms=layers * norms + hidden,
        router=layers * router,
        experts=layers * architecture.num_experts * expert,
        shared_expert=layers * shared,
        head=head,
        active_experts=layers * architecture.num_experts_per_tok * expert,
        largest_block=max(layer, vocab_size * hidden + head + hidden),
        largest_tensor=max(vocab_size * hidden, architecture.num_experts * 2 * hidden * architecture.moe_intermediate_size),
    )


def shared_hidden_size(family: FamilyName, architecture: Architecture) -> int:
    """Hidden size of the shared expert; 0 without one."""
    if family != "qwen2_moe":
        return 0
    return architecture.shared_expert_intermediate_size or architecture.moe_intermediate_size


def submodel_architecture(architecture: Architecture, clusters: int) -> Architecture:
    """Sizes of a sub-model: an even share of each layer's experts, with top-k limited to their number."""
    experts = architecture.num_experts // clusters
    return architecture.model_copy(
        update={"num_experts": experts, "num_experts_per_tok": min(architecture.num_experts_per_tok, experts)})
