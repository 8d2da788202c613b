"""Memory of one worker, by part.

Weights, gradients and optimizer state follow `optimizer.precision`: 2 + 2 + 4 bytes per parameter in pure bf16, else 4
+ 4 + 8.

Activations are counted tensor by tensor, as autograd saves them. The method is that of Korthikanti et al., "Reducing
activation recomputation in large transformer models" (arXiv 2205.05198, section 4.1), applied to layers with RMSNorm,
SwiGLU and attention that never stores its L x L scores. An element takes s bytes in a matrix product and r bytes in the
residual stream (r = 4 under autocast, else r = s). Then the activations of one token in one decoder layer take these
bytes:

* two RMSNorms, each keeping its input in fp32, the normalised vector, and its output: 2 (4 + r + s) D; or two
  LayerNorms, each keeping its input, its output, and a mean and a deviation in fp32: 2 ((r + s) D + 8);
* attention: queries, keys, values and the output, s (2Hd + 2Gd), and a log-sum-exp of 4 bytes per head; where queries
  and keys are normalised, their fp32 copies and normalised vectors too: (4 + s)(Hd + Gd), or 8(Hd + Gd) in families
  whose norms multiply by their weight in fp32 (there, r = 4 in the norms above too); where the output has a gate, the
  gate and the product 2sHd, and in fp32 4Hd more of the query projection; where only a part of each head is
  rotated, a copy of the output: sHd; where heads have sinks, no fused attention stores less than the scores rH(L + 1),
  under autocast also in bf16, and keys and values for every head: 2s(H - G)d; where every layer makes its own cosines
  and sines: 8d;
* latent attention: queries and keys 2sH(n + p), the product that holds the values sH(n + v), the output and its copy
  2sHv, and the normalised latents (4 + 2s)(r + q), with the sizes of `plan.parameters`;
* a recurrent state in place of attention: see `plan.recurrent_memory`;
* each of its k experts: a copy of the token, gate and up (one tensor), the activated gate, the product of gate and up,
  and the output before the router's weight scales it: s (2D + 4F), with the activation of gpt_oss s (2D + 7F); a
  layer's only expert, which runs as a dense MLP: 4sF, or 7sF; a shared expert: 4sS, and sD if it has a gate;
* the router: 4E for the scores, and 44k for the indices, weights and sort order of the selected experts; one that
  computes in fp32 keeps an fp32 copy of its input and of its scores, 4D + 8E, unless its input is in fp32 already; one
  that does so under autocast too keeps the input itself, (r - s)D more; SparseMixer keeps two softmaxes with their
  masks, (2r + 2)E; one with a first layer of h hidden units keeps them, sh;
* under autocast, each matrix product makes its own copy of its input in s bytes per element. So where several products
  have the same input (such as those for queries, keys and values), each product after the first adds sD.

For each token, the last norm adds (4 + r + s) D bytes, or (r + s) D + 8, and the gradient of its output 4D. Logits,
their copies and their gradient take 16V bytes per token, but at most 64 MiB in all, because the loss is computed in
tiles (`training.cross_entropy`).

The optimizer steps after the activations are freed. With `pure_bf16` it handles at most 2^24 elements of a tensor at a
time and holds fp32 copies of the gradient, both moments, the weight and the random bits: 20 bytes per element.

With `within_documents`, a GPU that computes in bf16 needs nothing more, because FlashAttention computes each document
by itself. In fp32, on a CPU and with latent attention, all layers share a mask of sL bytes per token, and each layer
copies keys and values for every head, 2s(H - G)d; only heads with sinks, which do both anyway, need no more.

Workers that share a model hold more for a while: see `plan.gang_memory`. Each weight is divided by its rows, so if the
number of experts is no multiple of the number of workers, the first worker's share of them is larger. Replicas divide
weights, gradients and optimizer state among fewer workers.

With gradient checkpointing, a layer keeps only its input (rD bytes per token), and one layer at a time is recomputed in
full.

With `moments: fp8`, both moments of a matrix take 2 bytes per parameter and a scale of 2 bytes for 128 elements each.
With `offload_moments` they are in the machine's memory, and the step holds copies of the moments that it handles.

With `block_steps`, gradients and moments are those of the largest block: a decoder layer, the embedding, or the head.
Frozen weights need no input of their matrix product for a gradient, so a layer keeps less: its norms 4 bytes of D each,
an expert s (D + 3F), or 3sF if it is the only one, a shared expert s (D + 3S), and no copies under autocast.

With adapters of a rank (`submodels.lora`), see `plan.adapter_memory`.

Letters: D hidden, H attention heads, G key-value heads, d head size, E experts, F expert hidden, S shared expert
hidden, V vocabulary, k top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, computed_field

from moedisco_ray.core.config import Architecture, Lora, Optimizer, read_architecture
from moedisco_ray.core.families import DECLARATIONS, Family, FamilyName
from moedisco_ray.core.limits import LOGITS_BYTES, MOMENT_BLOCK, STEP_ELEMENTS
from moedisco_ray.plan.adapter_memory import bytes_saved, router_bytes, sum_bytes
from moedisco_ray.plan.attention_memory import (
    attention_bytes,
    frozen_attention_bytes,
    needs_mask,
    norm_bytes,
    normalised_bytes,
)
from moedisco_ray.plan.gang_memory import Moment, gathered, largest_share, peak
from moedisco_ray.plan.parameters import (
    Parameters,
    adapter_parameters,
    count_parameters,
    recurrent_sizes,
    shared_hidden_size,
)
from moedisco_ray.policies.parallel import Layout

Exchange = Literal["step", "micro_batch"]
"""How often the workers of a sharded training exchange weights and gradients."""
GIB = 2**30
"""Bytes of a gigabyte, as GPU vendors count memory."""

_STATE_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 4)}
_FP8_BYTES = 2 * (1 + 2 / MOMENT_BLOCK)
"""Both moments of a matrix in 8 bits, with their scales (bytes per parameter)."""
_STEP_BYTES = {"fp32": 0, "bf16": 20}
"""Temporary memory of an optimizer step, by precision (bytes per element processed at once); fused fp32 AdamW needs
none."""
_FP8_STEP_BYTES = {"fp32": 16, "bf16": 20}
"""Temporary memory of an optimizer step with moments in 8 bits, by precision (bytes per element processed at once)."""
MUON_BYTES = 32
"""Temporary memory of Muon's step (bytes per element of the matrices that it handles at once): eight fp32 copies."""
_SCORE_BYTES = 4
"""A router's score (bytes per token and expert)."""
SELECTION_BYTES = 44
"""Indices, weights and sort order (bytes per token and selected expert), measured in the models of transformers 5."""
FIXED_OVERHEAD = 1 * GIB
"""Assumed memory of the CUDA context and of library workspaces (bytes)."""
_FRAGMENTATION = 0.05


class Memory(BaseModel, frozen=True):
    """Bytes that one worker holds at its peak, by part.

    The peak is in the backward pass or in the optimizer's step, whichever needs more memory. `activations` and
    `compute_copies` are freed before the optimizer's step, and `optimizer_step` is its temporary memory.
    `compute_copies` are copies of weights in the dtype of the forward pass. An unsharded model that is stored in fp32
    and multiplied in bf16 has copies of all weights. A sharded model has those of `plan.gang_memory`.
    With one micro-batch per step, only the output head has a gradient when the backward pass begins. From then on, the
    backward pass frees activations as fast as it creates gradients.
    `overhead` is an assumption: 1 GiB for the CUDA context and library workspaces, and 5 % for fragmentation.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    compute_copies: int
    optimizer_step: int
    overhead: int
    offloaded: int = 0
    """Moments in the machine's memory; not part of the total."""
    unpacked: int = 0
    """Bytes that weights in 4 bits take more when the model is written; not part of the total."""
    mean_share: float = 1.0
    """Mean share of the workers in a sharded model, as a part of the largest share, which this worker has."""

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property; pydantic documents this
    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Memory by part (weights, gradients, ...), in the order of the plan's table."""
        names = ("weights", "gradients", "optimizer", "activations", "compute_copies", "optimizer_step", "overhead")
        return {name: getattr(self, name) for name in names}


def worker_memory(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
    workers: int = 1,
    exchange: Exchange = "micro_batch",
    layout: Layout | None = None,
    lora: Lora | None = None,
) -> Memory:
    """Peak memory of one worker, if `workers` workers train one sharded model together.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        vocab_size: Rows of the embedding.
        optimizer: Precision, micro-batch and gradient checkpointing.
        sequence_length: Tokens per sequence.
        gpu: GPUs per worker; `precision: auto` depends on whether there are any.
        workers: Number of workers; weights, gradients and optimizer state are divided among them.
        exchange: How often they exchange weights and gradients.
        layout: How they share the model; None: all weights are sharded among all of them.
        lora: Adapters that one worker trains instead of the weights; None or rank 0: the weights are trained.
    """
    parameters = count_parameters(family, architecture, vocab_size)
    layout = layout or Layout(data=workers)
    share = largest_share(parameters, architecture, layout)
    weight_bytes, gradient_bytes, moment_bytes = _STATE_BYTES[optimizer.state]
    rank = 0 if lora is None else lora.rank
    width, adapters = compute_bytes(optimizer, gpu), adapter_parameters(family, architecture, rank)
    unpacked = bytes_saved(parameters, lora, width)
    trained = adapters or (largest_block(parameters, architecture) if optimizer.block_steps else share)
    weights = share * width - unpacked + adapters * weight_bytes if rank else share * weight_bytes
    gradients = trained * gradient_bytes
    moments = round(trained * (_FP8_BYTES if optimizer.moments == "fp8" else moment_bytes))
    if optimizer.name == "muon":
        moments -= moment_bytes // 2 * -(-parameters.matrices // layout.shards)
    autocast = workers == 1 and optimizer.state == "fp32" and width < 4 and not rank
    copies = width * parameters.total * autocast
    tokens = micro_batch_sequences(optimizer, sequence_length, workers) * sequence_length
    is_only_pass = worker_sequences(optimizer, sequence_length, workers) * sequence_length == tokens
    masked = needs_mask(family, architecture, optimizer, gpu)
    activations = min(LOGITS_BYTES, 16 * vocab_size * tokens) + tokens * activation_bytes_per_token(
        family,
        architecture,
        width,
        residual=4 if autocast else width,
        checkpointing=bool(optimizer.gradient_checkpointing),
        sequence_length=sequence_length,
        frozen=bool(optimizer.block_steps),
        masked=masked,
    )
    if rank:
        kept = 1 if optimizer.gradient_checkpointing else architecture.num_hidden_layers  # layers
        copies += sum_bytes(
            family, architecture, parameters, width, widest=_widest(family, architecture), checkpointing=kept == 1
        )
        activations -= tokens * (
            normalised_bytes(family, architecture, width, layers=kept)
            + router_bytes(family, architecture, width, layers=kept)
        )
    # The backward pass begins with the head's gradient. With blocks, gradients come last; those of adapters are small.
    largest = 0 if optimizer.block_steps or rank else parameters.largest_tensor
    if workers > 1:
        layer = layer_bytes_per_token(family, architecture, width, width, sequence_length, masked=masked)
        moment = peak(
            gathered(family, architecture, parameters, layout),
            width,
            gradients=gradients,
            kept=share * (layout.replicate > 1),
            activations=activations,
            layer_activations=tokens * layer,
            once_per_step=exchange == "step",
            is_only_pass=is_only_pass,
        )
    else:
        # With several micro-batches, the new gradient of a tensor exists next to the sum of the earlier ones until it
        # is added.
        early = 0 if is_only_pass and not rank else gradients
        moment = Moment(early + gradient_bytes * largest, activations, copies)
    elements = min(STEP_ELEMENTS, trained, -(-parameters.largest_tensor // workers))
    step = _step_bytes(optimizer, _widest(family, architecture), elements)
    in_backward = moment.total > gradients + step
    parts = {
        "weights": weights,
        "gradients": moment.gradients if in_backward else gradients,
        "optimizer": 0 if optimizer.offload_moments else moments,
        "activations": moment.activations if in_backward else 0,
        "compute_copies": moment.copies if in_backward else 0,
        "optimizer_step": 0 if in_backward else step,
    }
    return Memory(
        **parts,
        overhead=overhead(sum(parts.values())),
        offloaded=moments if optimizer.offload_moments else 0,
        unpacked=unpacked,
        mean_share=parameters.total / (share * layout.shards),
    )


def overhead(held: int) -> int:
    """Assumed bytes besides those that tensors hold: for the CUDA context, library workspaces and fragmentation."""
    return FIXED_OVERHEAD + int(_FRAGMENTATION * held)


def largest_block(parameters: Parameters, architecture: Architecture) -> int:
    """Parameters of the largest block that `block_steps` trains at a time."""
    last_norm = architecture.hidden_size
    layer = -(
        -(parameters.total - parameters.embedding - parameters.head - last_norm) // architecture.num_hidden_layers
    )
    return max(layer + parameters.above_mean, parameters.embedding, parameters.head + last_norm)


def exchange_of(
    setting: Literal["auto", "step", "micro_batch"], measure: Callable[[Exchange], Memory], pool_gb: float
) -> Exchange:
    """How often the workers of a sharded training exchange weights and gradients.

    Args:
        setting: The configured value.
        measure: Memory of one worker for each value.
        pool_gb: Memory of one worker of the pool (GB).
    """
    if setting != "auto":
        return setting
    return "step" if measure("step").total <= pool_gb * GIB else "micro_batch"


def _widest(family: FamilyName, architecture: Architecture) -> int:
    """Elements of the largest matrix that a step of Muon orthogonalises; one of dense layers is not looked at."""
    declaration = DECLARATIONS[family]
    rows = [
        architecture.moe_intermediate_size,
        architecture.shared_expert_intermediate_size or 0,
        architecture.num_attention_heads * architecture.head_size * (1 + declaration.attention.output_gate),
    ]
    if declaration.recurrence is not None:
        key_heads, heads, key_size, value_size, _ = recurrent_sizes(declaration, architecture)
        rows.append(2 * (key_heads * key_size + heads * value_size))
    return architecture.hidden_size * max(rows)


def _step_bytes(optimizer: Optimizer, widest: int, elements: int) -> int:
    fp8 = optimizer.moments == "fp8"
    by_adamw = (_FP8_STEP_BYTES if fp8 else _STEP_BYTES)[optimizer.state] * elements
    if optimizer.offload_moments:
        by_adamw += round((_FP8_BYTES if fp8 else _STATE_BYTES[optimizer.state][2]) * elements)
    if optimizer.name == "adamw":
        return by_adamw
    return max(by_adamw, MUON_BYTES * max(elements, widest))


def model_memory(
    directory: Path,
    family: FamilyName,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
    workers: int = 1,
    exchange: Exchange = "micro_batch",
    layout: Layout | None = None,
    lora: Lora | None = None,
) -> Memory:
    """`worker_memory` of the model in a Hugging Face directory.

    Raises:
        CheckpointError: The directory holds no model of the family.
    """
    architecture = read_architecture(directory, family)
    return worker_memory(
        family,
        architecture,
        architecture.vocab_size or 0,
        optimizer,
        sequence_length=sequence_length,
        gpu=gpu,
        workers=workers,
        exchange=exchange,
        layout=layout,
        lora=lora,
    )


def activation_bytes_per_token(
    family: FamilyName,
    architecture: Architecture,
    width: int,
    *,
    residual: int,
    checkpointing: bool,
    sequence_length: int,
    frozen: bool = False,
    masked: bool = False,
) -> int:
    """Bytes of activations per token of the micro-batch, without logits, by the formula in the docstring of this module.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        width: Bytes of an element in a matrix product.
        residual: Bytes of an element in the residual stream.
        checkpointing: Whether layers are recomputed in the backward pass.
        sequence_length: Tokens per sequence.
        frozen: Whether one layer trains and the others only pass gradients on.
        masked: Whether layers get a mask of documents; see `needs_mask`.
    """

    def measure(function: Callable[..., int], kind: bool) -> int:
        return function(family, architecture, width, residual, sequence_length, masked=masked, recurrent=kind)

    layers, hidden, kinds = architecture.num_hidden_layers, architecture.hidden_size, _layer_kinds(family, architecture)
    saved = {kind: measure(layer_bytes_per_token, kind) for kind in kinds}
    others = {kind: measure(frozen_bytes_per_token, kind) for kind in kinds} if frozen else saved
    largest = max(kinds, key=saved.__getitem__)
    kept = (
        layers * residual * hidden
        if checkpointing
        else sum(kinds[kind] * others[kind] for kind in kinds) - others[largest]
    )
    kept += saved[largest]
    kept += width * sequence_length * masked
    return kept + norm_bytes(DECLARATIONS[family], hidden, residual) + (width + 4) * hidden


def _layer_kinds(family: FamilyName, architecture: Architecture) -> dict[bool, int]:
    """Number of layers with a recurrent state (True) and with attention (False), of the kinds that the model has."""
    layers = architecture.num_hidden_layers
    recurrent = DECLARATIONS[family].recurrent_layers(architecture.fields, layers)
    return {kind: count for kind, count in ((True, recurrent), (False, layers - recurrent)) if count}


def layer_bytes_per_token(
    family: FamilyName,
    architecture: Architecture,
    width: int,
    residual: int,
    sequence_length: int,
    *,
    masked: bool = False,
    recurrent: bool | None = None,
) -> int:
    """Bytes per token of the activations that one MoE layer saves for the backward pass.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        width: Bytes of an element in a matrix product.
        residual: Bytes of an element in the residual stream.
        sequence_length: Tokens per sequence.
        masked: Whether the attention gets a mask of documents.
        recurrent: Whether the layer has a recurrent state in place of attention; None: the kind of layer that saves
            most.
    """
    if recurrent is None:
        return max(
            layer_bytes_per_token(family, architecture, width, residual, sequence_length, masked=masked, recurrent=kind)
            for kind in _layer_kinds(family, architecture)
        )
    declaration, hidden = DECLARATIONS[family], architecture.hidden_size
    norms = 2 * (norm_bytes(declaration, hidden, residual) + width * hidden)
    attention = attention_bytes(
        declaration, architecture, width, residual, sequence_length, masked=masked, recurrent=recurrent
    )
    routes = architecture.num_experts > 1
    expert = declaration.expert_activations * architecture.moe_intermediate_size + (2 * hidden if routes else 0)
    shared = shared_hidden_size(family, architecture)
    gate = declaration.shared is not None and declaration.shared.gate is not None
    held = norms + attention + width * architecture.num_experts_per_tok * expert + width * (4 * shared + gate * hidden)
    if routes:
        held += _router_bytes(declaration, architecture, width, residual)
        if declaration.router.in_fp32 and residual < 4:
            held += 4 * hidden
        if declaration.router.without_autocast:
            held += (residual - width) * hidden
    # Autocast copies the input of each matrix product to bf16. `norms` holds the copies for the query projection and
    # for the router (with one expert: its gate projection). More copies: for keys, for values (a latent is one
    # projection), or for the further projections of a recurrent layer; for a single expert's up projection unless it is
    # one matrix with the gate's; and for the shared expert's gate and up projections and its gate.
    mixing = 2 - declaration.attention.latent
    if recurrent and declaration.recurrence is not None:
        mixing = len(declaration.recurrence.projections) - 1
    casts = mixing + (not routes and not declaration.interleaved) + (2 + gate if shared else 0)
    casts *= residual > width
    return held + casts * width * hidden


def frozen_bytes_per_token(
    family: FamilyName,
    architecture: Architecture,
    width: int,
    residual: int,
    sequence_length: int,
    *,
    masked: bool = False,
    recurrent: bool = False,
) -> int:
    """Bytes of one layer's saved tensors per token, if its weights get no gradients; see `layer_bytes_per_token`."""
    declaration, hidden = DECLARATIONS[family], architecture.hidden_size
    attention = frozen_attention_bytes(
        declaration, architecture, width, residual, sequence_length, masked=masked, recurrent=recurrent
    )
    experts = (declaration.expert_activations - 1) * architecture.moe_intermediate_size
    routes = architecture.num_experts > 1
    experts += hidden if routes else 0
    shared = shared_hidden_size(family, architecture)
    gate = declaration.shared is not None and declaration.shared.gate is not None
    norms = 2 * norm_bytes(declaration, hidden, residual, frozen=True)
    held = norms + attention + width * architecture.num_experts_per_tok * experts
    return (
        held + width * (gate * hidden + 3 * shared) + routes * _router_bytes(declaration, architecture, width, residual)
    )


def _router_bytes(family: Family, sizes: Architecture, width: int, residual: int) -> int:
    """Bytes of hidden units, scores and selected experts; a router in fp32 keeps its scores in fp32 too."""
    score = _SCORE_BYTES + (8 if family.router.in_fp32 and residual < 4 else 0)
    if family.router.scores == "sparse_mixer":
        score = 2 * (residual + 1)
    units = family.router.hidden_size(sizes.fields, sizes.num_experts)
    return width * units + score * sizes.num_experts + SELECTION_BYTES * sizes.num_experts_per_tok


def compute_bytes(optimizer: Optimizer, gpu: int) -> int:
    """Bytes of an element in the forward pass: 2 in bf16, 4 in fp32."""
    bf16 = optimizer.arithmetic(gpu=gpu > 0) == "bf16"
    return 2 if bf16 else 4


def worker_sequences(optimizer: Optimizer, sequence_length: int, workers: int) -> int:
    """Sequences that each worker processes in one step."""
    return max(1, -(-optimizer.batch_tokens // (sequence_length * workers)))


def micro_batch_sequences(optimizer: Optimizer, sequence_length: int, workers: int) -> int:
    """Number of sequences in one forward pass of a worker."""
    share = worker_sequences(optimizer, sequence_length, workers)
    return min(share, optimizer.micro_batch or share)
