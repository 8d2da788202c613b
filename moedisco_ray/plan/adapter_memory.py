"""Memory of a training of adapters (`lora`), next to what `plan.memory` counts.

Weights are stored in the dtype of matrix products, and only adapters have gradients and moments. With `base: nf4`, the
matrices of the layers are stored in 4 bits (`training.nf4`): half a byte per weight, 1 byte for each 64 and 4 bytes for
each 16,384.

The sum of a weight and its adapter is made when a pass reads it, and made again in the backward pass (`training.lora`),
where it exists together with its gradient: the largest of the model counts twice. With gradient checkpointing, all sums
of one layer exist with the gradient of the down projections; when that of gate and up is made, twice as large, the sum
of down is gone.

Frozen norms keep no normalised vectors (`attention_memory.normalised_bytes`), and frozen routers no inputs.
"""

from __future__ import annotations

from moedisco_ray.core.config import Architecture, Lora
from moedisco_ray.core.families import DECLARATIONS, FamilyName
from moedisco_ray.core.limits import NF4_BLOCK, NF4_GROUP
from moedisco_ray.plan.parameters import Parameters, dense_hidden_size

NF4_BYTES = 1 / 2 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_GROUP)
"""A weight in 4 bits, with its part of the scales and of their factors, as `training.nf4` stores it (bytes)."""


def bytes_saved(parameters: Parameters, lora: Lora | None, width: int) -> int:
    """Bytes by which frozen weights are smaller on the device than in `width` bytes per parameter."""
    return 0 if lora is None or lora.base == "full" else round((width - NF4_BYTES) * parameters.matrices)


def sum_bytes(
    family: FamilyName, sizes: Architecture, parameters: Parameters, width: int, *, widest: int, checkpointing: bool
) -> int:
    """Bytes of the sums of weights and adapters that exist at a time, and of the gradient of one.

    Args:
        family: The model's family.
        sizes: Sizes of the model.
        parameters: Parameter counts of the model.
        width: Bytes of an element in a matrix product.
        widest: Elements of the largest matrix of a layer, without stacks of experts and dense layers.
        checkpointing: Whether layers are recomputed in the backward pass.
    """
    layers = sizes.num_hidden_layers
    if checkpointing:
        return width * (parameters.matrices + parameters.experts // 3) // layers
    dense_layers = min(layers, DECLARATIONS[family].dense_layers(sizes.fields))
    dense = sizes.hidden_size * dense_hidden_size(family, sizes) if dense_layers else 0
    stack = 2 * parameters.experts // (3 * max(1, layers - dense_layers))  # gate and up projections
    return 2 * width * max(stack, dense, widest)


def router_bytes(family: FamilyName, sizes: Architecture, width: int, layers: int) -> int:
    """Bytes per token of the inputs that trained routers keep and frozen ones do not, in some layers.

    A shared expert keeps the same input for its adapters; the copy in fp32 is the router's own.
    """
    declaration = DECLARATIONS[family]
    if sizes.num_experts == 1:
        return 0
    each = 0 if declaration.shared else width
    each += 4 if declaration.router.in_fp32 and width < 4 else 0
    return min(layers, sizes.num_hidden_layers - declaration.dense_layers(sizes.fields)) * each * sizes.hidden_size
