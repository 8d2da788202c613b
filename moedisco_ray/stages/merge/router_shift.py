"""What the routers must know of text that stays with its data owner.

The owner's node runs the owner's sub-model on its own text and on text without an owner. The difference of the mean
inputs of each router leaves: one vector per router. For the owner's cluster, the merge runs text without an owner
through the merged model, and adds the vector to the router's inputs. So these have the owner's mean and the covariance
of other text, and no layer of the merged model has to visit the owner.

Shapes: R routers, B sequences, L positions, D hidden, C clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedisco_ray.core.store.locations import CORPUS
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.models import moe_blocks, specialise
from moedisco_ray.models.layer_stream import final_states, grouped
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.stages.calibration_text import Batch, spread
from moedisco_ray.stages.scoring import default_dtype

Array = NDArray[np.float32]


def router_shift(
    submodel: Path, *, owner_store: RunStore, shards: Path, windows: int, sequence_length: int, device: str
) -> Array:
    """Mean input of each router on a data owner's text, minus that on text without an owner, float32 [R, D].

    Args:
        submodel: The owner's trained sub-model, which both texts run through.
        owner_store: The run's folder in the owner's storage.
        shards: Packed tokens without an owner.
        windows: Number of windows of each text, spread evenly over it.
        sequence_length: Length of a window.
        device: Device that the sub-model runs on.
    """
    owned = owner_store.directory / CORPUS / "shards"
    model = specialise(open_streamed(submodel, dtype=default_dtype(device), device=device))
    with owner_store.using(owned):
        means = [_mean_inputs(model, _windows(each, windows, sequence_length), device) for each in (owned, shards)]
    return (means[0] - means[1]).float().cpu().numpy()


def shifts_of_clusters(shifts: Mapping[int, Array], clusters: int) -> NDArray[np.float32] | None:
    """The shifts of all clusters, [R, C, D], zero for those of text without an owner; None if all are."""
    if not shifts:
        return None
    routers, hidden = next(iter(shifts.values())).shape
    shift_RCD = np.zeros((routers, clusters, hidden), dtype=np.float32)
    for cluster, shift_RD in shifts.items():
        shift_RCD[:, cluster] = shift_RD
    return shift_RCD


def _windows(shards: Path, windows: int, sequence_length: int) -> list[Batch]:
    stream = TokenStream([shards], sequence_length)
    return spread(stream, min(windows, len(stream)), 0)


@torch.inference_mode()
def _mean_inputs(model: PreTrainedModel, batches: Sequence[Batch], device: str) -> Tensor:
    """Mean input of each router, float64 [R, D]."""
    blocks = list(moe_blocks(model).values())
    sum_RD = torch.zeros(len(blocks), int(model.config.hidden_size), dtype=torch.float64, device=device)

    def add(number: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sum_RD[number] += inputs[0].flatten(0, -2).double().sum(0)

        return hook

    handles = [block.register_forward_pre_hook(add(number)) for number, block in enumerate(blocks)]
    for group in grouped(batches, lambda batch: batch[0].size, model):
        inputs = (torch.as_tensor(tokens_BL, dtype=torch.long, device=device) for tokens_BL, _ in group)
        for _ in final_states(model, inputs):
            pass
    for handle in handles:
        handle.remove()
    return sum_RD / sum(tokens_BL.size for tokens_BL, _ in batches)
