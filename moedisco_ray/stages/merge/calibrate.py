"""Calibrate the merged model's routers layer by layer, on its own hidden states.

The router's input at layer l depends on the routers of all layers before it, so layers are calibrated in order: stop the
forward pass at layer l, collect the inputs, set the router rows, and continue with layer l + 1.

If the weights of the selected experts are not normalised to sum to one, experts that were trained at a weight of 1 get a smaller
weight after the merge. To keep the output's scale, `match_scale` multiplies a layer's `down_proj` by the ratio of the mean weight
before the merge to that after it.

Shapes: B documents, L sequence length, T tokens, D hidden, E experts, C clusters, g = E / C, K top-k.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import ModelMap, group_size, moe_blocks
from moedisco_ray.stages.merge.router_init import Statistics, constant_direction, directions, load_offsets, normalised, statistics

RouterMethod = Literal["ridge", "random", "concat"]
"""How router rows are computed; `concat` keeps the rows that the model has, for example those of an upcycled seed."""
Batch = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Tokens [B, L] and the cluster of each document [B]."""

_LEAST_CONSTANT = 1e-3


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """How routers are calibrated.

    Attributes:
        method: How each cluster's direction, which is added to the router rows of its experts, is computed.
        match_load: Whether to shift the rows until each group of experts gets its cluster's share of the tokens; not for `concat`.
        match_scale: Whether to rescale the experts' output if the top-k weights are not normalised.
        seed: Seed of the method `random`.
    """

    method: RouterMethod
    match_load: bool = True
    match_scale: bool = True
    seed: int = 0


class _LayerReachedError(Exception):
    """Ends a forward pass at the layer whose input is collected."""


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, clusters: int, batches: Sequence[Batch], settings: RouterSettings,
) -> list[dict[str, Any]]:
    """Replace the concatenated router rows of a merged model by calibrated ones, in place.

    The experts of sub-model k form group k. An expert's calibrated row is its row in the sub-model plus the direction of cluster k,
    which is the same for the whole group. In a group of one expert, the row in the sub-model is untrained and counts as zero.
    The method `concat` leaves all rows as they are.

    Returns:
        Per MoE layer: `layer`, `accuracy` (share of tokens whose top-1 expert is in the group of their own cluster),
        `top1_load_C` (share of tokens whose top-1 expert is in each group), `group_load_C` (share of top-k selections per
        group), `load_E` (the same per expert), `weight_sum` (mean sum of the selected weights), `scale` (factor on `down_proj`).

    Raises:
        CheckpointError: There is no calibration data, or a cluster index is out of range.
    """
    if not batches:
        raise CheckpointError("merge.calibration_tokens", None, "gave no calibration data; there must be some")
    if any(cluster_B.min() < 0 or cluster_B.max() >= clusters for _, cluster_B in batches):
        raise CheckpointError("clusters", clusters, "the calibration data names a cluster beyond these")
    normalises = _normalises(model)
    was_training = model.training
    model.eval()
    report = []
    for layer, block in moe_blocks(model).items():
        router: Any = block.get_submodule("gate")
        rows_ED = router.weight
        group = group_size(len(rows_ED), clusters)
        inputs = list(_router_inputs(model, block, batches))
        own_ED = rows_ED.double().cpu()
        if settings.method != "concat":
            total = _total(inputs, clusters)
            carried_ED = own_ED if group > 1 else torch.zeros_like(own_ED)
            direction_CD = directions(settings.method, total, settings.seed + layer)
            if settings.match_load:
                direction_CD = _load_matched(direction_CD, carried_ED, inputs, total)
            rows_ED.copy_(carried_ED + direction_CD.repeat_interleave(group, dim=0))
        entry = _measure(rows_ED.double().cpu(), own_ED, inputs, clusters, min(router.top_k, len(rows_ED)))
        scale = entry.pop("branch_weight_sum") / entry["weight_sum"] if settings.match_scale and not normalises else 1.0
        if scale != 1.0:
            experts: Any = block.get_submodule("experts")
            experts.down_proj.mul_(scale)
        report.append({"layer": layer, "scale": scale, **entry})
    model.train(was_training)
    return report


def _normalises(model: PreTrainedModel) -> bool:
    family = ModelMap(str(model.config.model_type)).family
    return family.always_normalises or bool(model.config.norm_topk_prob)


def _router_inputs(
    model: PreTrainedModel, block: nn.Module, batches: Sequence[Batch],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs x_TD of one MoE block on all batches, with the cluster of each token's document."""
    device = next(model.parameters()).device
    caught: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _LayerReachedError

    handle = block.register_forward_pre_hook(stop)
    try:
        for tokens_BL, cluster_B in batches:
            with contextlib.suppress(_LayerReachedError):
                model(input_ids=torch.as_tensor(tokens_BL, dtype=torch.long, device=device), use_cache=False)
            x_TD = caught.pop().flatten(0, 1).cpu()
            cluster_T = torch.as_tensor(cluster_B, dtype=torch.long).repeat_interleave(tokens_BL.shape[1])
            yield x_TD, cluster_T
    finally:
        handle.remove()


def _total(inputs: Sequence[tuple[Tensor, Tensor]], clusters: int) -> Statistics:
    total = statistics(*inputs[0], clusters)
    for x_TD, cluster_T in inputs[1:]:
        total += statistics(x_TD, cluster_T, clusters)
    return total


def _load_matched(
    direction_CD: Tensor, carried_ED: Tensor, inputs: Sequence[tuple[Tensor, Tensor]], total: Statistics,
) -> Tensor:
    """Add a multiple of one vector v to each cluster's router row, so that top-1 loads equal the clusters' shares.

    v is chosen so that v . x > 0 for most inputs x of the router. Adding b_c v to row c adds b_c (v . x) to a token's logit c.
    Dividing all its logits by v . x > 0 keeps their order and leaves b_c as a bias, which `load_offsets` finds. The few tokens with
    v . x <= 0 are left out.
    """
    clusters = len(direction_CD)
    constant_D = constant_direction(total)
    logits = []
    for input_TD, _ in inputs:
        x_TD = input_TD.double()
        own_TC = (x_TD @ carried_ED.T).view(len(x_TD), clusters, -1).amax(2)
        constant_T = x_TD @ constant_D
        positive_T = constant_T > _LEAST_CONSTANT
        logits.append((own_TC + x_TD @ direction_CD.T)[positive_T] / constant_T[positive_T, None])
    offset_C = load_offsets(torch.cat(logits), total.count_C / total.count_C.sum())
    matched_CD = direction_CD + offset_C[:, None] * constant_D
    return matched_CD if carried_ED.any() else normalised(matched_CD, total)


def _measure(
    rows_ED: Tensor, own_ED: Tensor, inputs: Sequence[tuple[Tensor, Tensor]], clusters: int, top_k: int,
) -> dict[str, Any]:
    """Load and accuracy of the merged router on the calibration data, and the mean sum of top-k weights in the sub-models."""
    experts = len(rows_ED)
    group = experts // clusters
    own_CgD = own_ED.view(clusters, group, -1)
    load_E = torch.zeros(experts, dtype=torch.float64)
    first_C = torch.zeros(clusters, dtype=torch.float64)
    tokens, hits, weight_sum, branch_sum = 0, 0, 0.0, 0.0
    for input_TD, cluster_T in inputs:
        x_TD = input_TD.double()
        chosen = torch.softmax(x_TD @ rows_ED.T, dim=1).topk(top_k, dim=1)
        load_E += torch.bincount(chosen.indices.flatten(), minlength=experts)
        first_T = chosen.indices[:, 0] // group
        first_C += torch.bincount(first_T, minlength=clusters)
        hits += int((first_T == cluster_T).sum())
        tokens += len(x_TD)
        weight_sum += float(chosen.values.sum())
        branch_Tg = torch.softmax(torch.einsum("td,cgd->tcg", x_TD, own_CgD), dim=2)[torch.arange(len(x_TD)), cluster_T]
        branch_sum += float(branch_Tg.topk(min(top_k, group), dim=1).values.sum())
    load_E /= load_E.sum()
    return {
        "accuracy": hits / tokens,
        "top1_load_C": (first_C / tokens).tolist(),
        "group_load_C": load_E.view(clusters, group).sum(1).tolist(),
        "load_E": load_E.tolist(),
        "weight_sum": weight_sum / tokens,
        "branch_weight_sum": branch_sum / tokens,
    }
