"""Exact parameter counts per role, from sizes alone.

Letters in formulas: D hidden size, H attention heads, G key-value heads, d size of one head, F hidden size of an
expert, S hidden size of the shared expert, I hidden size of a dense layer's MLP, N experts of a layer, V vocabulary.
"""

from __future__ import annotations

from pydantic import BaseModel, computed_field

from moedisco_ray.core.config import Architecture
from moedisco_ray.core.families import DECLARATIONS, Family, FamilyName


class Parameters(BaseModel, frozen=True):
    """Number of parameters of a model by role, over all layers.

    A tied head has no parameters of its own, but its matrix product is computed all the same.
    """

    embedding: int
    attention: int
    norms: int
    router: int
    experts: int
    shared_expert: int
    dense: int = 0
    """Parameters of the MLPs of dense layers."""
    head: int
    active_experts: int
    """Parameters of the experts that one token passes through."""
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
        return self._between + self.active_experts + max(self.head, self.embedding)

    @property
    def _between(self) -> int:
        return self.attention + self.norms + self.router + self.shared_expert + self.dense


def count_parameters(family: FamilyName, architecture: Architecture, vocab_size: int) -> Parameters:
    """Count the parameters of the family's Hugging Face model.

    Per layer: two norms 2D, the attention and its own norms, and either an MoE block or a dense MLP 3DI. An MoE block has a router
    ND, experts 3NDF and a shared expert 3DS. Some families add a bias of the router N, biases of the experts N(2F + D), or a gate
    of the shared expert D. Outside the layers: a last norm D, an embedding VD, and a head VD unless tied. LayerNorms have a
    bias too, 2D each, and some families a bias of the head V.
    """
    declaration, fields = DECLARATIONS[family], architecture.fields
    hidden, layers, experts = architecture.hidden_size, architecture.num_hidden_layers, architecture.num_experts
    dense_layers = min(layers, declaration.dense_layers(fields))
    moe_layers = layers - dense_layers
    attention, attention_norms = (_latent if declaration.attention.latent else _grouped)(declaration, architecture)
    norm = hidden * (2 if declaration.layer_norms else 1)
    norms = 2 * norm + attention_norms
    router = experts * (hidden + (declaration.router.bias is not None))
    biases = 2 * architecture.moe_intermediate_size + hidden if any(name.endswith("_bias") for name in declaration.stacks) else 0
    expert = 3 * hidden * architecture.moe_intermediate_size + biases
    shared_size = shared_hidden_size(family, architecture)
    shared = 3 * hidden * shared_size + (hidden if declaration.shared is not None and declaration.shared.gate else 0)
    dense = 3 * hidden * dense_hidden_size(family, architecture)
    head = 0 if architecture.tie_word_embeddings else vocab_size * hidden
    if declaration.head_bias_field is not None and declaration.value(fields, declaration.head_bias_field):
        head += vocab_size
    return Parameters(
        embedding=vocab_size * hidden,
        attention=layers * attention,
        norms=layers * norms + norm,
        router=moe_layers * router,
        experts=moe_layers * experts * expert,
        shared_expert=moe_layers * shared,
        dense=dense_layers * dense,
        head=head,
        active_experts=moe_layers * architecture.num_experts_per_tok * expert,
        largest_tensor=max(vocab_size * hidden, experts * 2 * hidden * architecture.moe_intermediate_size),
    )


def _grouped(family: Family, sizes: Architecture) -> tuple[int, int]:
    """Parameters of grouped-query attention and of its norms: 2DHd + 2DGd, with biases Hd + 2Gd (+ D), sinks H, and norms."""
    queries, keys = sizes.num_attention_heads * sizes.head_size, sizes.key_value_heads * sizes.head_size
    attention = 2 * sizes.hidden_size * (queries + keys) + family.attention.sinks * sizes.num_attention_heads
    if family.has_biases(sizes.fields):
        attention += queries + 2 * keys + (sizes.hidden_size if family.attention.biases == "qkvo" else 0)
    if not family.has_qk_norm(sizes.fields):
        return attention, 0
    return attention, 2 * sizes.head_size if family.attention.qk_norm == "head" else queries + keys


def _latent(family: Family, sizes: Architecture) -> tuple[int, int]:
    """Parameters of latent attention and of its norms.

    With a latent of size r for keys and values, heads of size n + p for queries and keys (p of them rotated) and v for values:
    keys and values D(r + p) + rH(n + v), output HvD, queries DH(n + p), or through a latent of size q: Dq + qH(n + p).
    """
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    query_latent, latent, plain, rotated, value = latent_sizes(family, sizes)
    queries = query_latent * (hidden + heads * (plain + rotated)) or hidden * heads * (plain + rotated)
    attention = queries + hidden * (latent + rotated) + latent * heads * (plain + value) + heads * value * hidden
    if family.has_biases(sizes.fields):
        attention += query_latent + latent + rotated + hidden
    return attention, query_latent + latent


def adapter_parameters(family: FamilyName, architecture: Architecture, rank: int) -> int:
    """Parameters of the adapters of a rank: rank (inputs + outputs) for each matrix of the layers.

    The gate and up projections of an expert are one matrix; those of a shared expert and of a dense layer are two.
    """
    declaration, hidden, heads = DECLARATIONS[family], architecture.hidden_size, architecture.num_attention_heads
    layers = architecture.num_hidden_layers
    moe_layers = layers - min(layers, declaration.dense_layers(architecture.fields))
    if declaration.attention.latent:
        query_latent, latent, plain, rotated, value = latent_sizes(declaration, architecture)
        queries = heads * (plain + rotated)
        attention = hidden + queries + 2 * query_latent + (hidden + latent + rotated) + (latent + heads * (plain + value))
        attention += heads * value + hidden
    else:
        attention = 4 * hidden + 2 * (heads + architecture.key_value_heads) * architecture.head_size
    expert = 2 * hidden + 3 * architecture.moe_intermediate_size
    shared, dense = shared_hidden_size(family, architecture), dense_hidden_size(family, architecture)
    moe = architecture.num_experts * expert + 3 * (hidden + shared) * bool(shared)
    return rank * (layers * attention + moe_layers * moe + (layers - moe_layers) * 3 * (hidden + dense))


def latent_sizes(family: Family, sizes: Architecture) -> tuple[int, int, int, int, int]:
    """Sizes q, r, n, p and v of latent attention: see `_latent`. Without a latent of the queries, q is 0."""
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    query_latent, latent, plain, rotated, value = (int(family.value(sizes.fields, name) or 0) for name in names)
    return query_latent, latent, plain, rotated, value


def shared_hidden_size(family: FamilyName, architecture: Architecture) -> int:
    """Hidden size of the shared expert; 0 without one."""
    declaration = DECLARATIONS[family]
    if declaration.shared is None:
        return 0
    if declaration.shared.count_field is None:
        return architecture.shared_expert_intermediate_size or architecture.moe_intermediate_size
    return architecture.moe_intermediate_size * int(declaration.value(architecture.fields, declaration.shared.count_field))


def dense_hidden_size(family: FamilyName, architecture: Architecture) -> int:
    """Hidden size of the MLP in dense layers."""
    return int(DECLARATIONS[family].value(architecture.fields, "intermediate_size") or architecture.moe_intermediate_size)


def submodel_architecture(family: FamilyName, architecture: Architecture, clusters: int) -> Architecture:
    """Sizes of a sub-model: an even share of each layer's experts, with a router that fits them."""
    experts = architecture.num_experts // clusters
    router = DECLARATIONS[family].router
    fields = router.submodel_fields(architecture.router_fields(router), architecture.num_experts, experts)
    top_k = fields.pop(router.top_k_field)
    return architecture.model_copy(
        update={"num_experts": experts, "num_experts_per_tok": top_k, "fields": architecture.fields | fields})
