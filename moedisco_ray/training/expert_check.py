"""Check that every expert that got tokens gets a gradient, whichever worker has it.

Axes: N routers, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.errors import TrainingError
from moedisco_ray.models import moe_blocks
from moedisco_ray.training.job import World
from moedisco_ray.training.sharded_files import local_part


@torch.no_grad()
def check_experts(model: PreTrainedModel, selections_NE: Tensor, world: World) -> None:
    """Raise an error if an expert was selected in the last step but none of its weights has a gradient.

    Every worker must call it.

    Layers with one expert, and layers whose experts are not trained now, are left out.

    Args:
        model: The model, after the backward pass of a step.
        selections_NE: How often each expert was selected in the step's global batch.
        world: Rank and device of this worker, and the number of workers.

    Raises:
        TrainingError: An expert with tokens has no gradient.
    """
    blocks = {
        index: block for index, block in moe_blocks(model).items() if block.get_submodule("experts").num_experts != 1
    }
    moved_NE = torch.zeros_like(selections_NE)
    for n, block in enumerate(blocks.values()):
        trained = [each for each in block.get_submodule("experts").parameters() if each.requires_grad]
        moved_NE[n] = not trained
        for weight in trained:  # or the adapters of the weights
            if weight.grad is None:
                moved_NE[n] = 1
                continue
            part, offset = local_part(weight.grad)
            found = part.flatten(1).ne(0).any(dim=1) if part.numel() else part.new_zeros(len(part), dtype=torch.bool)
            moved_NE[n, offset[0] : offset[0] + len(part)] += found.to(moved_NE.device)
    if world.size > 1:
        dist.all_reduce(moved_NE)
    stuck = ((selections_NE > 0) & (moved_NE == 0)).nonzero().tolist()
    if stuck:
        layer, expert = list(blocks)[stuck[0][0]], stuck[0][1]
        raise TrainingError(
            f"expert {expert} of layer {layer} got tokens but no gradient, with {len(stuck) - 1} more; report this "
            "with the configuration"
        )
