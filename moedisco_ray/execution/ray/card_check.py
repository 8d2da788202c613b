"""Check that torch can compute on the GPU that a worker holds."""

from __future__ import annotations

import os

import ray

from moedisco_ray.core.errors import CardError
from moedisco_ray.execution.card_product import failure

ALLOCATOR_VARIABLES = frozenset({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"})
"""Variables with settings of torch's allocator; the one without a maker is for any GPU. With segments that grow, less
memory is lost to fragments: torch's out-of-memory errors name them as the first remedy."""


def check_card(field: str) -> None:
    """Compute on this worker's GPUs.

    Ray Train lets each worker of a gang see the GPUs of all workers on its node; those that Ray gave to this process
    are checked. It is the first use of the GPU, for which torch reads the settings of its allocator: where the user has
    none, memory segments grow.

    Args:
        field: Setting that asks for the GPU, such as `pools.low_memory.gpu`.

    Raises:
        CardError: torch cannot compute on the GPU.
    """
    if not os.environ.keys() & ALLOCATOR_VARIABLES:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    for card in own_cards():
        found = failure(field, *card, ray.util.get_node_ip_address())
        if found is not None:
            raise CardError(field, 1, found, ray.get_runtime_context().get_node_id())


def own_cards() -> list[tuple[str, str]]:
    """The GPUs that Ray gave to this process: the index of each on the machine, and torch's name for it."""
    held = [str(index) for index in ray.get_gpu_ids()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not held or not {*held} <= {*visible}:
        return [("0", "cuda:0")]
    return [(index, f"cuda:{visible.index(index)}") for index in held]
