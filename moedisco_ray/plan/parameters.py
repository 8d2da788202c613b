"""Exact parameter counts per role, from sizes alone.

Letters in formulas: D hidden size, H attention heads, G key-value heads, d size of one head, F hidden size of an
expert, S hidden size of the shared expert, I hidden size of a dense layer's MLP, N experts of a layer, V vocabulary. Of
a recurrent layer: K key heads of size c, U value heads of size v, and w positions in the convolution.
"""

from __future__ import annotations

from pydantic import BaseModel, computed_field

from moedisco_ray.core.config import Architecture
from moedisco_ray.core.families import DECLARATIONS, Family, FamilyName

CHUNK = 64
"""Tokens that transformers' gated delta rule computes at a time."""


class Parameters(BaseModel, frozen=True, defer_build=True):
    """Number of parameters of a model by role, over all layers.

    A tied head has no parameters of its own, but its matrix product is computed all the same.
    """

    embedding: int
    attention: int
    """Parameters of the attention, and of what recurrent layers have in its place."""
    norms: int
    router: int
    experts: int
    shared_expert: int
    dense: int = 0
    """Parameters of the MLPs of dense layers."""
    above_mean: int = 0
    """Parameters that the largest layer has more than the mean layer, if some layers are recurrent and others have
    attention."""
    recurrent_layers: int = 0
    """Number of layers with a recurrent state in place of attention."""
    recurrence_flops: int = 0
    """Operations of the recurrences of all layers in a forward pass, per token."""
    head: int
    active_experts: int
    """Parameters of the experts that one token passes through."""
    largest_tensor: int
    """Number of elements of the largest tensor: the embedding, or the stacked gate and up projections of a layer's
    experts."""

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
    def matrices(self) -> int:
        """Parameters in the matrices of the layers, which Muon or adapters train. A few biases are counted too."""
        return self.attention + self.experts + self.shared_expert + self.dense

    @property
    def _between(self) -> int:
        return self.attention + self.norms + self.router + self.shared_expert + self.dense


def count_parameters(family: FamilyName, architecture: Architecture, vocab_size: int) -> Parameters:
    """Count the parameters of the family's Hugging Face model.

    Per layer: two norms 2D, the attention and its own norms, and either an MoE block or a dense MLP 3DI. An MoE block
    has a router ND, experts 3NDF and a shared expert 3DS. Some families add a bias of the router N, a first layer of
    the router with h hidden units that makes it Nh + hD, biases of the experts N(2F + D), or a gate of the shared
    expert D. Outside the layers: a last norm D, an embedding VD, and a head VD unless tied. LayerNorms have a bias too,
    2D each, and some families a bias of the head V.
    """
    declaration, fields = DECLARATIONS[family], architecture.fields
    hidden, layers, experts = architecture.hidden_size, architecture.num_hidden_layers, architecture.num_experts
    dense_layers = min(layers, declaration.dense_layers(fields))
    moe_layers = layers - dense_layers
    attention, attention_norms = (_latent if declaration.attention.latent else _grouped)(declaration, architecture)
    norm = hidden * (2 if declaration.layer_norms else 1)
    recurrent_layers = declaration.recurrent_layers(fields, layers)
    recurrence, recurrent_norm = _recurrent(declaration, architecture) if recurrent_layers else (0, 0)
    attention_layers = layers - recurrent_layers
    units = declaration.router.hidden_size(fields, experts)
    router = experts * ((units or hidden) + (declaration.router.bias is not None)) + units * hidden
    biases = (
        2 * architecture.moe_intermediate_size + hidden
        if any(name.endswith("_bias") for name in declaration.stacks)
        else 0
    )
    expert = 3 * hidden * architecture.moe_intermediate_size + biases
    shared_size = shared_hidden_size(family, architecture)
    shared = 3 * hidden * shared_size + (hidden if declaration.shared is not None and declaration.shared.gate else 0)
    dense = 3 * hidden * dense_hidden_size(family, architecture)
    head = 0 if architecture.tie_word_embeddings else vocab_size * hidden
    if declaration.head_bias_field is not None and declaration.value(fields, declaration.head_bias_field):
        head += vocab_size
    return Parameters(
        embedding=vocab_size * hidden,
        attention=attention_layers * attention + recurrent_layers * recurrence,
        norms=(2 * layers + 1) * norm + attention_layers * attention_norms + recurrent_layers * recurrent_norm,
        router=moe_layers * router,
        experts=moe_layers * experts * expert,
        shared_expert=moe_layers * shared,
        dense=dense_layers * dense,
        above_mean=_above_mean(
            (attention_layers, attention + attention_norms), (recurrent_layers, recurrence + recurrent_norm)
        ),
        recurrent_layers=recurrent_layers,
        recurrence_flops=recurrent_layers * _recurrence_flops(declaration, architecture) if recurrent_layers else 0,
        head=head,
        active_experts=moe_layers * architecture.num_experts_per_tok * expert,
        largest_tensor=max(vocab_size * hidden, experts * 2 * hidden * architecture.moe_intermediate_size),
    )


def _grouped(family: Family, sizes: Architecture) -> tuple[int, int]:
    """Parameters of grouped-query attention and its norms: 2DHd + 2DGd, biases Hd + 2Gd (+ D), sinks H, and the norms.

    A gate of the output doubles the rows of the query projection.
    """
    queries, keys = sizes.num_attention_heads * sizes.head_size, sizes.key_value_heads * sizes.head_size
    gate = queries * family.attention.output_gate
    attention = sizes.hidden_size * (2 * (queries + keys) + gate) + family.attention.sinks * sizes.num_attention_heads
    if family.has_biases(sizes.fields):
        attention += gate + queries + 2 * keys + (sizes.hidden_size if family.attention.biases == "qkvo" else 0)
    if not family.has_qk_norm(sizes.fields):
        return attention, 0
    return attention, 2 * sizes.head_size if family.attention.qk_norm == "head" else queries + keys


def _latent(family: Family, sizes: Architecture) -> tuple[int, int]:
    """Parameters of latent attention and of its norms.

    With a latent of size r for keys and values, heads of size n + p for queries and keys (p of them rotated) and v for
    values: keys and values D(r + p) + rH(n + v), output HvD, queries DH(n + p), or through a latent of size q: Dq +
    qH(n + p).
    """
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    query_latent, latent, plain, rotated, value = latent_sizes(family, sizes)
    queries = query_latent * (hidden + heads * (plain + rotated)) or hidden * heads * (plain + rotated)
    attention = queries + hidden * (latent + rotated) + latent * heads * (plain + value) + heads * value * hidden
    if family.has_biases(sizes.fields):
        attention += query_latent + latent + rotated + hidden
    return attention, query_latent + latent


def _recurrent(family: Family, sizes: Architecture) -> tuple[int, int]:
    """Parameters of a recurrent layer's part in place of attention, and of its norm v.

    Projections 2D(Kc + Uv) + 2DU, output DUv, convolution w(2Kc + Uv), and two numbers per value head 2U.
    """
    key_heads, value_heads, key_size, value_size, window = recurrent_sizes(family, sizes)
    keys, values = key_heads * key_size, value_heads * value_size
    projections = sizes.hidden_size * (2 * (keys + values + value_heads) + values)
    return projections + window * (2 * keys + values) + 2 * value_heads, value_size


def _above_mean(*kinds: tuple[int, int]) -> int:
    """How much larger the largest layer is than the mean, from the number and the size of the layers of each kind."""
    mean = sum(count * size for count, size in kinds) // sum(count for count, _ in kinds)
    return max(size for count, size in kinds if count) - mean


def _recurrence_flops(family: Family, sizes: Architecture) -> int:
    """Operations per token of a forward pass of the gated delta rule, in chunks of 64 tokens (arXiv 2412.06464, 3.3).

    Per value head: products with the state 6cv, and within the chunk 64 (4c + 2v), and the solution of a triangular
    system with c + v right-hand sides 64 (c + v).
    """
    _, heads, key_size, value_size, _ = recurrent_sizes(family, sizes)
    return heads * (6 * key_size * value_size + CHUNK * (5 * key_size + 3 * value_size))


def recurrent_sizes(family: Family, sizes: Architecture) -> tuple[int, int, int, int, int]:
    """Key heads, value heads, size of a key, size of a value, and positions in the convolution of a recurrent layer."""
    names = (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    )
    key_heads, value_heads, key_size, value_size, window = (int(family.value(sizes.fields, name)) for name in names)
    return key_heads, value_heads, key_size, value_size, window


def largest_layer(family: FamilyName, architecture: Architecture, parameters: Parameters) -> int:
    """Parameters of the largest layer."""
    layers = architecture.num_hidden_layers
    dense = min(layers, DECLARATIONS[family].dense_layers(architecture.fields))
    mixture = (parameters.router + parameters.experts + parameters.shared_expert) // max(1, layers - dense)
    every = (parameters.attention + parameters.norms - architecture.hidden_size) // layers + parameters.above_mean
    return every + max(mixture, parameters.dense // max(1, dense))


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
        attention = (
            hidden + queries + 2 * query_latent + (hidden + latent + rotated) + (latent + heads * (plain + value))
        )
        attention += heads * value + hidden
    else:
        rows = 2 * (heads + architecture.key_value_heads) + heads * declaration.attention.output_gate
        attention = 4 * hidden + rows * architecture.head_size
    recurrent_layers, recurrence = declaration.recurrent_layers(architecture.fields, layers), 0
    if declaration.recurrence is not None:
        key_heads, value_heads, key_size, value_size, _ = recurrent_sizes(declaration, architecture)
        matrices = len(declaration.recurrence.projections) + 1
        recurrence = matrices * hidden + 2 * (key_heads * key_size + value_heads) + 3 * value_heads * value_size
    expert = 2 * hidden + 3 * architecture.moe_intermediate_size
    shared, dense = shared_hidden_size(family, architecture), dense_hidden_size(family, architecture)
    moe = architecture.num_experts * expert + 3 * (hidden + shared) * bool(shared)
    mixers = (layers - recurrent_layers) * attention + recurrent_layers * recurrence
    return rank * (mixers + moe_layers * moe + (layers - moe_layers) * 3 * (hidden + dense))


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
    return architecture.moe_intermediate_size * int(
        declaration.value(architecture.fields, declaration.shared.count_field)
    )


def dense_hidden_size(family: FamilyName, architecture: Architecture) -> int:
    """Hidden size of the MLP in dense layers."""
    return int(
        DECLARATIONS[family].value(architecture.fields, "intermediate_size") or architecture.moe_intermediate_size
    )


def submodel_architecture(family: FamilyName, architecture: Architecture, clusters: int) -> Architecture:
    """Sizes of a sub-model: an even share of each layer's experts, with a router that fits them."""
    experts = architecture.num_experts // clusters
    router = DECLARATIONS[family].router
    fields = router.submodel_fields(architecture.router_fields(router), architecture.num_experts, experts)
    top_k = fields.pop(router.top_k_field)
    return architecture.model_copy(
        update={"num_experts": experts, "num_experts_per_tok": top_k, "fields": architecture.fields | fields}
    )
