"""Memory of a device that runs a model without training it: to calibrate routers, to evaluate, to embed documents.

`models.streamed` keeps a model loaded if all of its weights take at most 40 % of a GPU. Else one part is loaded at a
time: a decoder layer, or the head. The embedding stays in the machine's memory. Calibration always loads one layer at a
time. Next to the weights are the hidden states of the text: those of one batch or, if an evaluation loads layer by
layer, of all text, up to 4 GiB, because all batches pass through a layer before the next one is loaded.

Nothing is kept for a backward pass, so the activations are the most that a layer holds at a time. An element takes s
bytes. Next to the layer's input, one token takes:

* attention: the normalised input sD; queries, keys and values s(Hd + 2Gd); and the parts of the rotation, s max(3Hd, Hd
  + 3Gd). Latent attention: queries, before and after the rotation, keys, what holds keys and values, and the output,
  sH(3(n + p) + (n + v) + v). Where heads have sinks: queries, keys, values, the latter two also for every head, and the
  scores, less their maximum, and their softmax, and two masks: s(3Hd + 2Gd) + 3sH(L + 1) + 2sL;
* a recurrent state in place of attention (`plan.recurrent_memory`): the output of the convolution and the gate s(2Kc +
  2V), twice if one projection gives both; and in fp32, of sequences padded to whole chunks: queries, keys and keys
  times factors, before and after decays, values, times factors, corrected, and the output, the larger one of 24E + 16V
  and 20E + 20V; three matrices of 64 by 64 per value head, 768U; and factors and decays, 24U;
* experts: the residual and its norm 2sD, and for each of k experts 44 bytes of indices and the larger one of: a copy of
  the token, gate and up, the activated gate, and the product, s(D + 4F), with the activation and gathered biases of
  gpt_oss s(D + 9F); or the copy, the output, and the output times its weight, in the order of experts and of tokens,
  2sD + 2wD, where a weight has w bytes. The router's scores take sE or 4E, and the output of a shared expert sD;
* a layer's only expert, a shared expert, or a dense MLP: 2sD and 4sF, or s(D + 3S) and 2sF next to an only expert, or
  3sI;
* where embeddings have a factor, a copy of the input: sD;
* the masks of padded documents, where vectors are computed: (1 + s)L;
* the head: the last norm and its real positions 2sD, and logits in fp32 and their log-softmax 8V, for at most 2^25
  logits.

Calibration sums over the inputs of a router in fp64, while its layer is loaded. An element of a batch takes s + 8
bytes, and its scores 40E per token. Four matrices of 8D^2 bytes exist at a time: in the eigenvalue solver X^T X, its
eigenvectors, and a workspace of two. Loads of clusters are matched on four matrices of 8C bytes per token of all
batches.

Letters: as in `plan.activation_memory`; n, p and v are the sizes of latent attention (`plan.parameters`), I the hidden
size of a dense layer's MLP, L the length of a sequence, C the number of clusters.
"""

from __future__ import annotations

import dataclasses

from moedisco_ray.core.config import AnyPool, Architecture, FamilyName, RunConfig
from moedisco_ray.core.config.apart import apart_choice
from moedisco_ray.core.families import DECLARATIONS, Family
from moedisco_ray.core.limits import (
    BATCH_TOKENS,
    CALIBRATION_WINDOWS,
    CPU_STATES,
    ENSEMBLE_BLOCK,
    GPU_STATES,
    MOST_LOGITS,
    RESIDENT_BYTES,
    RESIDENT_SHARE,
    VECTOR_TOKENS,
)
from moedisco_ray.plan.activation_memory import SELECTION_BYTES
from moedisco_ray.plan.memory import GIB, Memory, overhead
from moedisco_ray.plan.parameters import (
    CHUNK,
    Parameters,
    count_parameters,
    dense_hidden_size,
    largest_layer,
    latent_sizes,
    recurrent_sizes,
    shared_hidden_size,
    submodel_architecture,
)


@dataclasses.dataclass(frozen=True)
class StreamedModel:
    """A model as `models.streamed` runs it on one worker.

    Attributes:
        family: The model's family.
        sizes: Sizes of the model.
        vocab_size: Rows of the embedding.
        gpu: GPUs of the worker; it computes in bf16 if there are any, else in fp32.
        memory_gb: Memory of the worker (GiB).
    """

    family: FamilyName
    sizes: Architecture
    vocab_size: int
    gpu: int
    memory_gb: float

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return 2 if self.gpu else 4

    @property
    def parameters(self) -> Parameters:
        """Parameter counts of the model."""
        return count_parameters(self.family, self.sizes, self.vocab_size)

    @property
    def stays(self) -> bool:
        """Whether all weights stay loaded."""
        most = RESIDENT_SHARE * self.memory_gb * GIB if self.gpu else RESIDENT_BYTES
        return self.width * self.parameters.total <= most

    @property
    def layer(self) -> int:
        """Bytes of the weights of the largest layer."""
        return self.width * largest_layer(self.family, self.sizes, self.parameters)

    @property
    def head(self) -> int:
        """Bytes of the weights of the head, which is loaded apart from the embedding even if it is tied."""
        return self.width * max(self.parameters.head, self.parameters.embedding)

    def states(self, tokens: int) -> int:
        """Bytes of the hidden states of some tokens."""
        return self.width * self.sizes.hidden_size * tokens


def ensemble_contexts(config: RunConfig, tokens: int) -> int:
    """Number of tokens that are read to weight the sub-models of an ensemble on a text of some tokens.

    The weights of a block depend on the text before the block, which is half a sequence long on average.
    """
    return tokens * config.corpus.sequence_length // (2 * ENSEMBLE_BLOCK)


def calibration_memory(model: StreamedModel, *, tokens: int, sequence_length: int, clusters: int) -> Memory:
    """Peak memory of the merge's router calibration.

    Args:
        model: The merged model.
        tokens: Tokens of all calibration data.
        sequence_length: Tokens of a window.
        clusters: Number of clusters.
    """
    hidden, experts = model.sizes.hidden_size, model.sizes.num_experts
    windows = min(CALIBRATION_WINDOWS, max(1, BATCH_TOKENS // sequence_length), -(-tokens // sequence_length))
    batch = windows * sequence_length
    layers = model.states(batch) + batch * layer_bytes_per_token(
        model.family, model.sizes, model.width, sequence_length
    )
    sums = batch * ((model.width + 8) * hidden + 40 * experts) + 32 * hidden**2 + 32 * clusters * tokens
    return _memory(model.layer, max(layers, sums))


def scoring_memory(model: StreamedModel, *, tokens: int, sequence_length: int) -> Memory:
    """Peak memory of computing a model's loss on text.

    Args:
        model: The model.
        tokens: Tokens of the text.
        sequence_length: Maximum tokens of a window.
    """
    batch = sequence_length * min(max(1, BATCH_TOKENS // sequence_length), -(-tokens // sequence_length))
    logits = 2 * model.states(batch) + 8 * min(MOST_LOGITS, model.vocab_size * batch)
    layer = layer_bytes_per_token(model.family, model.sizes, model.width, sequence_length)
    return _passes(model, tokens, batch, layer=batch * layer, head=model.head, logits=logits)


def vectors_memory(model: StreamedModel, *, tokens: int, sequence_length: int) -> Memory:
    """Peak memory of computing vectors of documents from a model's hidden states.

    Args:
        model: The model.
        tokens: Tokens of the documents.
        sequence_length: Maximum tokens that are read of a document.
    """
    batch = min(max(VECTOR_TOKENS, sequence_length), tokens) if model.gpu else sequence_length
    masks = (1 + model.width) * sequence_length
    layer = layer_bytes_per_token(model.family, model.sizes, model.width, sequence_length) + masks
    return _passes(model, tokens, batch, layer=batch * layer, head=0, logits=0)


def _passes(model: StreamedModel, tokens: int, batch: int, *, layer: int, head: int, logits: int) -> Memory:
    """Peak memory of forward passes, from the bytes of a layer's activations and of the head's weights and logits."""
    if model.stays:
        parts = model.parameters
        others = model.width * (parts.total - parts.embedding - parts.head)
        return _memory(others + head, model.states(batch) + max(layer, logits))
    states = max(model.states(batch), min(model.states(tokens), GPU_STATES if model.gpu else CPU_STATES))
    weights, held = max((model.layer, layer), (head, logits), key=sum)
    return _memory(weights, states + held)


def _memory(weights: int, activations: int) -> Memory:
    return Memory(
        weights=weights,
        gradients=0,
        optimizer=0,
        activations=activations,
        compute_copies=0,
        optimizer_step=0,
        overhead=overhead(weights + activations),
    )


def layer_bytes_per_token(family: FamilyName, sizes: Architecture, width: int, length: int) -> int:
    """Maximum bytes per token that a layer holds at a time next to its input, without gradients.

    Args:
        family: The model's family.
        sizes: Sizes of the model.
        width: Bytes of an element.
        length: Tokens of a sequence.
    """
    declaration, state, shared = DECLARATIONS[family], width * sizes.hidden_size, shared_hidden_size(family, sizes)
    recurrent = declaration.recurrent_layers(sizes.fields, sizes.num_hidden_layers)
    attention = _recurrent(declaration, sizes, width, length) if recurrent else 0
    if recurrent < sizes.num_hidden_layers:
        attention = max(
            attention, (_latent if declaration.attention.latent else _grouped)(declaration, sizes, width, length)
        )
    attention += state
    blocks = [_experts(declaration, sizes, width, bool(shared))]
    if shared:
        kept = 2 * sizes.moe_intermediate_size if sizes.num_experts == 1 else 0
        blocks.append(state + width * (3 * shared + kept))
    if declaration.dense_layers(sizes.fields):
        blocks.append(3 * width * dense_hidden_size(family, sizes))
    return state * (declaration.embedding_factor is not None) + max(attention, 2 * state + max(blocks))


def _grouped(family: Family, sizes: Architecture, width: int, length: int) -> int:
    queries, keys = sizes.num_attention_heads * sizes.head_size, sizes.key_value_heads * sizes.head_size
    if family.attention.sinks:
        return width * (3 * queries + 2 * keys + 3 * sizes.num_attention_heads * (length + 1) + 2 * length)
    gate = queries * family.attention.output_gate
    return width * (gate + queries + 2 * keys + max(3 * queries, queries + 3 * keys))


def _latent(family: Family, sizes: Architecture, width: int, length: int) -> int:  # noqa: ARG001 - as `_grouped`
    _, _, plain, rotated, value = latent_sizes(family, sizes)
    return width * sizes.num_attention_heads * (3 * (plain + rotated) + (plain + value) + value)


def _recurrent(family: Family, sizes: Architecture, width: int, length: int) -> int:
    key_heads, heads, key_size, value_size, _ = recurrent_sizes(family, sizes)
    keys, values, padded = heads * key_size, heads * value_size, -(-length // CHUNK) * CHUNK
    fused = family.recurrence is not None and family.recurrence.fused
    held = width * (2 * key_heads * key_size + 2 * values) * (1 + fused)
    return held + (4 * max(6 * keys + 4 * values, 5 * keys + 5 * values) + (12 * CHUNK + 24) * heads) * padded // length


def _experts(family: Family, sizes: Architecture, width: int, shared: bool) -> int:
    hidden, inner = sizes.hidden_size, sizes.moe_intermediate_size
    if sizes.num_experts == 1:
        return width * family.expert_activations * inner
    gathered = 2 * (family.router.bias is not None)  # the biases of each token's experts, next to gate and up
    weight = 4 if family.router.weights_in_fp32 else width
    score = 4 if family.router.in_fp32 else width
    each = max(width * (hidden + (family.expert_activations + gathered) * inner), 2 * (width + weight) * hidden)
    return (each + SELECTION_BYTES) * sizes.num_experts_per_tok + score * sizes.num_experts + shared * width * hidden


@dataclasses.dataclass(frozen=True)
class Streams:
    """Memory of the models of a run as workers of its pools run text through them.

    Attributes:
        config: The run's configuration.
        vocab_size: Entries of the vocabulary.
    """

    config: RunConfig
    vocab_size: int

    @property
    def embedding_pool(self) -> AnyPool | None:
        """The pool on which documents' vectors are computed; None if no model computes them."""
        return self.config.vectors_pool if self.config.tokens.decoupled else None

    @property
    def _length(self) -> int:
        return self.config.corpus.sequence_length

    @property
    def _part(self) -> Architecture:
        return submodel_architecture(self.config.model.family_name, self._whole, self.config.cluster_count)

    @property
    def _whole(self) -> Architecture:
        return self.config.model.architecture

    def calibration(self, pool: AnyPool, tokens: int) -> Memory:
        """Peak memory of calibrating the merged model's routers on tokens."""
        return calibration_memory(
            self._on(pool, self._whole), tokens=tokens, sequence_length=self._length, clusters=self.config.cluster_count
        )

    def generation(self, pool: AnyPool, tokens: int) -> Memory:
        """Peak memory of generating tokens of one sample."""
        return scoring_memory(self._on(pool, self._whole), tokens=tokens, sequence_length=tokens)

    def evaluation(self, pool: AnyPool, tokens: int) -> Memory:
        """Peak memory of evaluating all models of the run on tokens."""
        phases = self.config.tokens
        shapes = (self._whole, self._part) if phases.decoupled or phases.seed else (self._whole,)
        found = [scoring_memory(self._on(pool, shape), tokens=tokens, sequence_length=self._length) for shape in shapes]
        if self.embedding_pool is not None and pool is self.config.finetune_pool:
            asked = tokens if apart_choice(self.config) == "never" else ensemble_contexts(self.config, tokens)
            found.append(self.vectors(pool, max(tokens, asked)))
        return max(found, key=lambda memory: memory.total)

    def vectors(self, pool: AnyPool, tokens: int) -> Memory:
        """Peak memory of computing documents' vectors."""
        sizes = self._whole if self.config.model.starts_from_moe else self._part
        return vectors_memory(self._on(pool, sizes), tokens=tokens, sequence_length=self._length)

    def _on(self, pool: AnyPool, sizes: Architecture) -> StreamedModel:
        memory_gb = max(kind.memory_gb for kind in pool.node_types)
        return StreamedModel(self.config.model.family_name, sizes, self.vocab_size, pool.gpu, memory_gb)
