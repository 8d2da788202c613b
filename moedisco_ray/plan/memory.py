"""Memory of one worker, by part.

Weights, gradients and optimizer state follow `optimizer.precision`: 2 + 2 + 4 bytes per parameter in pure bf16, else 4
+ 4 + 8.

Activations follow `plan.activation_memory`. Logits, their copies and their gradient take 16 bytes per token and row of
the embedding, but at most 64 MiB in all, because the loss is computed in tiles (`training.cross_entropy`).

The optimizer steps after the activations are freed. With `pure_bf16` it handles at most 2^24 elements of a tensor at a
time and holds fp32 copies of the gradient, both moments, the weight and the random bits: 20 bytes per element.

Workers that share a model hold more for a while: see `plan.gang_memory`. Each weight is divided by its rows, so if the
number of experts is no multiple of the number of workers, the first worker's share of them is larger. Replicas divide
weights, gradients and optimizer state among fewer workers.

With `moments: fp8`, both moments of a matrix take 2 bytes per parameter and a scale of 2 bytes for 128 elements each.
With `offload_moments` they are in the machine's memory, and the step holds copies of the moments that it handles.

With `block_steps`, gradients and moments are those of the largest block: a decoder layer, the embedding, or the head.

With adapters of a rank (`lora`), see `plan.adapter_memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, computed_field

from moedisco_ray.core.config import Architecture, Lora, Optimizer
from moedisco_ray.core.families import DECLARATIONS, FamilyName
from moedisco_ray.core.limits import LOGITS_BYTES, MOMENT_BLOCK, STEP_ELEMENTS
from moedisco_ray.plan.activation_memory import activation_bytes_per_token, layer_bytes_per_token
from moedisco_ray.plan.adapter_memory import bytes_saved, router_bytes, sum_bytes
from moedisco_ray.plan.attention_memory import needs_mask, normalised_bytes
from moedisco_ray.plan.gang_memory import Moment, gathered, largest_share, peak
from moedisco_ray.plan.parameters import Parameters, adapter_parameters, count_parameters, recurrent_sizes
from moedisco_ray.policies.parallel import Layout

Exchange = Literal["step", "micro_batch"]
"""How often the workers of a sharded training exchange weights and gradients."""
GIB = 2**30
"""Bytes of a gigabyte, as GPU vendors count memory."""

STATE_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 4)}
"""Bytes per parameter of weights, gradients and both of AdamW's moments, by the dtype of the weights."""
_FP8_BYTES = 2 * (1 + 2 / MOMENT_BLOCK)
"""Both moments of a matrix in 8 bits, with their scales (bytes per parameter)."""
_STEP_BYTES = {"fp32": 0, "bf16": 20}
"""Temporary memory of an optimizer step, by precision (bytes per element processed at once); fused fp32 AdamW needs
none."""
_FP8_STEP_BYTES = {"fp32": 16, "bf16": 20}
"""Temporary memory of an optimizer step with moments in 8 bits, by precision (bytes per element processed at once)."""
MUON_BYTES = 32
"""Temporary memory of Muon's step (bytes per element of the matrices that it handles at once): eight fp32 copies."""
_MUON_EXCHANGE_BYTES = 12
"""Memory of Muon's exchange in a gang (bytes per element that a worker exchanges at once): in fp32, what it receives,
what comes back, and what it sent, which the library of the exchange may still hold."""
FIXED_OVERHEAD = 1 * GIB
"""Assumed memory of the CUDA context and of library workspaces (bytes)."""
_FRAGMENTATION = 0.05


class Memory(BaseModel, frozen=True, defer_build=True):
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
    streamed: int = 0
    """Weights in the machine's memory, from which one layer at a time comes to the card; not part of the total."""
    host: int = 0
    """Bytes that streamed training holds in the machine's memory: weights, gradients, optimizer state, and the inputs
    of each layer; not part of the total."""
    synced: int = 0
    """Bytes that a member of syncs fills in the machine's memory for them; not part of the total."""
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

    @property
    def on_host(self) -> int:
        """Bytes that the worker holds in the machine's memory: offloaded or streamed, and for syncs."""
        return (self.host or self.offloaded) + self.synced

    def fits(self, card_gb: float, host_gb: float | None = None) -> bool:
        """Whether a worker has enough memory.

        Args:
            card_gb: Memory of its card (GiB).
            host_gb: Main memory that it may fill (GiB); None if unknown, and assumed to be enough.
        """
        return self.total <= card_gb * GIB and (host_gb is None or self.on_host <= host_gb * GIB)

    def excess(self, card_gb: float, host_gb: float | None = None) -> float:
        """Memory that a worker needs as a multiple of what it has, of its card or of the host, whichever is larger."""
        of_host = 0.0 if host_gb is None else self.on_host / max(1.0, host_gb * GIB)
        return max(self.total / (card_gb * GIB), of_host)


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
    weight_bytes, gradient_bytes, _ = STATE_BYTES[optimizer.state]
    rank = 0 if lora is None else lora.rank
    width, adapters = compute_bytes(optimizer, gpu), adapter_parameters(family, architecture, rank)
    unpacked = bytes_saved(parameters, lora, width)
    trained = adapters or (largest_block(parameters, architecture) if optimizer.block_steps else share)
    weights = share * width - unpacked + adapters * weight_bytes if rank else share * weight_bytes
    gradients = trained * gradient_bytes
    moments = state_bytes(optimizer, trained, -(-parameters.matrices // layout.shards))
    autocast = workers == 1 and optimizer.state == "fp32" and width < 4 and not rank
    copies = width * parameters.total * autocast
    tokens = micro_batch_sequences(optimizer, sequence_length, workers) * sequence_length
    is_only_pass = worker_sequences(optimizer, sequence_length, workers) * sequence_length == tokens
    masked, widest = needs_mask(family, architecture, optimizer, gpu), widest_matrix(family, architecture)
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
        copies += sum_bytes(family, architecture, parameters, width, widest=widest, checkpointing=kept == 1)
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
    step = step_bytes(optimizer, widest, elements)
    if optimizer.name == "muon" and layout.shards > 1:
        rows = -(-(parameters.matrices - parameters.experts) // layout.shards)
        step += _MUON_EXCHANGE_BYTES * min(max(STEP_ELEMENTS, widest), rows)  # `training.shared_matrices.windows`
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


def state_bytes(optimizer: Optimizer, trained: int, matrices: int) -> int:
    """Bytes of the optimizer's state.

    Args:
        optimizer: The optimizer's settings.
        trained: Parameters that train.
        matrices: Number of these that Muon trains if it is the optimizer.
    """
    each = STATE_BYTES[optimizer.state][2]
    moments = round(trained * (_FP8_BYTES if optimizer.moments == "fp8" else each))
    return moments - each // 2 * matrices if optimizer.name == "muon" else moments


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


def exchange_of(measure: Callable[[Exchange], Memory], pool_gb: float) -> Exchange:
    """How often the workers of a sharded training exchange weights and gradients: once per step if that fits.

    Args:
        measure: Memory of one worker for each value.
        pool_gb: Memory of one worker of the pool (GiB).
    """
    return "step" if measure("step").total <= pool_gb * GIB else "micro_batch"


def widest_matrix(family: FamilyName, architecture: Architecture) -> int:
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


def step_bytes(optimizer: Optimizer, widest: int, elements: int) -> int:
    """Temporary memory of an optimizer's step.

    Args:
        optimizer: The optimizer's settings.
        widest: Elements of the largest matrix that Muon orthogonalises.
        elements: Elements that the step handles at once.
    """
    fp8 = optimizer.moments == "fp8"
    by_adamw = (_FP8_STEP_BYTES if fp8 else _STEP_BYTES)[optimizer.state] * elements
    if optimizer.offload_moments:
        by_adamw += round((_FP8_BYTES if fp8 else STATE_BYTES[optimizer.state][2]) * elements)
    if optimizer.name == "adamw":
        return by_adamw
    return max(by_adamw, MUON_BYTES * max(elements, widest))


def compute_bytes(optimizer: Optimizer, gpu: int) -> int:
    """Bytes of an element in the forward pass: 2 in bf16, 4 in fp32."""
    bf16 = optimizer.arithmetic(bf16=gpu > 0) == "bf16"
    return 2 if bf16 else 4


def worker_sequences(optimizer: Optimizer, sequence_length: int, workers: int) -> int:
    """Sequences that each worker processes in one step."""
    return max(1, -(-optimizer.batch_tokens // (sequence_length * workers)))


def micro_batch_sequences(optimizer: Optimizer, sequence_length: int, workers: int) -> int:
    """Number of sequences in one forward pass of a worker."""
    share = worker_sequences(optimizer, sequence_length, workers)
    return min(share, optimizer.micro_batch or share)
