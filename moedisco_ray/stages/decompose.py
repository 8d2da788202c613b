"""The decompose stage: it cuts the MoE into one sub-model per cluster, tensor by tensor.

Sub-model k of C has the whole backbone and shared expert, and the k-th group of g = E / C routed experts of every layer
with their router rows, renumbered from 0. It is a model of the same family; with g = 1 it is equivalent to a dense
model. If the family's own router limits each token to some groups of experts, a sub-model has whole such groups, or a
part of one.

In a run that starts from a trained MoE, a sub-model has the experts that its cluster's text selects most, see
`expert_use`, and the merge puts them back in their places. Groups stay those by index where text stays with data
owners, where the merge computes routers anew, and where the family's router limits tokens to groups of experts. What
each sub-model loses on its cluster's text is measured, and the run ends if that is too much.

    DIRECTORY/backbone/     backbone and shared expert, written once
              K/            the experts and router rows of sub-model K; its index also names the files of the backbone
              experts.json  per layer, the start's expert at each place of the sub-models, one after the other; absent
                            if groups are by index

So `DIRECTORY/K` opens like any Hugging Face directory, and all sub-models together take little more space than the MoE.

Shapes: E experts, D hidden, g experts per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moedisco_ray.core.config import derived
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.limits import SHARD_BYTES
from moedisco_ray.core.records.cut import DecomposeSummary, StartLoss
from moedisco_ray.core.store.artifacts import Draft, write_json
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.models import (
    BACKBONE,
    ModelMap,
    Role,
    canonical_shapes,
    check_complete,
    check_experts,
    expert_count,
    group_size,
    open_checkpoint,
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.models.expert_order import Order
from moedisco_ray.stages.calibration_text import Batch, in_smaller_batches
from moedisco_ray.stages.context import Context, device_of
from moedisco_ray.stages.expert_use import FILE, SHARES, groups, order_in, samples, selections, window_nats
from moedisco_ray.stages.start import Start, start_model, untrained_moe, whole_moe
from moedisco_ray.stages.text.tokenizer import Encoder


def run(context: Context, draft: Draft) -> None:
    """Cut the MoE into one sub-model per cluster; do nothing in a run without sub-models.

    Raises:
        ConfigError: A sub-model of a trained MoE loses more than `submodels.start_loss`.
    """
    config, pool = context.config, context.config.pools.low_memory
    if not config.tokens.decoupled:
        return
    if not derived.measures_cut(config):
        files = Files([context.start.tokenizer, *filter(None, [context.trained_seed])], [draft.path])
        written = context.call(
            None,
            files,
            write_untrained_submodels,
            context.start,
            clusters=config.cluster_count,
            trained_seed=context.trained_seed,
            directory=draft.path,
        )
    else:
        batches = samples(context)
        written = context.call(
            pool,
            Files([context.start.tokenizer], [draft.path]),
            write_measured_submodels,
            context.start,
            clusters=config.cluster_count,
            batches=batches,
            by_use=derived.experts_by_use(config),
            device=device_of(pool),
            directory=draft.path,
            smaller={"batches": in_smaller_batches(batches)},
        )
    summary = DecomposeSummary.model_validate(written)
    check_losses(summary.losses, config.submodels.start_loss)
    draft.summary.update(summary.to_json())


def write_untrained_submodels(
    start: Start, *, clusters: int, trained_seed: Path | None, directory: Path
) -> dict[str, Any]:
    """Write the sub-models with their initial weights, which come from the trained seed if there is one.

    Returns:
        `bytes`: the size of each sub-model.
    """
    source, config = whole_moe(start, trained_seed)
    return {"bytes": write_submodels(source, config, clusters, directory)}


def write_measured_submodels(
    start: Start, *, clusters: int, batches: Sequence[Batch], by_use: bool, device: str, directory: Path
) -> dict[str, Any]:
    """Write the sub-models of a trained MoE, and measure what each of them loses on its cluster's text.

    Args:
        start: Settings and files of the MoE.
        clusters: Number of sub-models.
        batches: Text of the clusters; a cluster may have none.
        by_use: Whether sub-models have the experts that their clusters' text selects most, not those by index.
        device: Device that the models run on, in parts if they are large.
        directory: Parent directory of the sub-models.

    Returns:
        `bytes`: the size of each sub-model; `losses`: `cluster`, and the loss of MoE (`start`) and `submodel` in nats
        per token, for each cluster with text; and with `by_use`, the shares of `groups`.
    """
    source, config = start_model(start)
    text: dict[str, Any] = {
        "prefix": Encoder(start.tokenizer).prefix,
        "sequence_length": start.sequence_length,
        "device": device,
    }
    counted, start_nats_N = selections(source, config, batches, clusters, **text)
    use = groups(counted) if by_use else None
    sizes = write_submodels(source, config, clusters, directory, order=None if use is None else order_in(use))
    if use is not None:
        write_json(directory / FILE, use)
    cluster_N = np.concatenate([cluster_B for _, cluster_B in batches])
    group, losses = group_size(expert_count(config), clusters), []
    for k in np.unique(cluster_N).tolist():
        own = [batch for batch in batches if batch[1][0] == k]
        tokens = sum(tokens_BL.size for tokens_BL, _ in own)
        nats_N = window_nats(open_checkpoint(directory / str(k)), submodel_config(config, group), own, **text)
        losses.append(
            {
                "cluster": k,
                "start": float(start_nats_N[cluster_N == k].sum() / tokens),
                "submodel": float(nats_N.sum() / tokens),
            }
        )
    shares = {} if use is None else {name: use[name] for name in SHARES}
    return {"bytes": sizes, "losses": losses, **shares}


def check_losses(losses: Sequence[StartLoss], most: float | None) -> None:
    """Check that no sub-model loses too much of what the MoE has learnt.

    Args:
        losses: Loss of each sub-model on its cluster's text, and that of the MoE.
        most: Largest difference (nats per token); None allows any.

    Raises:
        ConfigError: A sub-model's loss is larger, or no number.
    """
    if most is None or not losses:
        return
    worst = max(losses, key=lambda each: (not each.lost <= most, each.lost))
    if not worst.lost <= most:
        raise ConfigError(
            "submodels.start_loss",
            most,
            f"sub-model {worst.cluster} would begin with a loss of {worst.submodel:.3f} nats per token on its own "
            f"cluster's text, {worst.lost:.3f} above the MoE that it is cut from; train the whole MoE instead "
            "(`recipe: auto`, or tokens.finetune_share=1), use fewer clusters, or allow the loss: a larger number, or "
            "null for any",
        )


def write_common_start(start: Start, *, clusters: int, directory: Path) -> None:
    """Write the untrained model from which all sub-models start: the MoE's backbone with sub-model 0's experts."""
    source, config = untrained_moe(start)
    experts = start.model.architecture.num_experts
    tensors = decompose(source, ModelMap(start.model.family_name), experts, clusters, 0)
    write_checkpoint(directory, tensors, submodel_config(config, group_size(experts, clusters)))


def decompose(
    source: Mapping[str, Tensor],
    model_map: ModelMap,
    num_experts: int,
    clusters: int,
    cluster: int,
    *,
    backbone: bool = True,
    order: Order | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one sub-model, in the source's order. Experts of other groups are never read.

    Args:
        source: Canonical tensors of the whole MoE.
        model_map: Tensor names of the MoE's family.
        num_experts: Experts of every MoE layer, E.
        clusters: Number of sub-models.
        cluster: Index k of this sub-model.
        backbone: Whether to include the tensors that all sub-models have in common.
        order: Per layer the experts, group after group, each group in the source's order; None: by index.

    Raises:
        CheckpointError: A tensor is unknown or missing, or a layer has another number of experts.
        ConfigError: The number of experts is not divisible by the number of clusters.
    """
    group = group_size(num_experts, clusters)
    first = cluster * group
    check_experts(source, model_map, num_experts)
    for key in source:
        role = model_map.classify(key)
        own: Sequence[int] = range(first, first + group)
        if order is not None and role.layer is not None and role.layer in order:
            own = order[role.layer][first : first + group]
        if role.expert_axis is not None:
            yield key, _rows(key, source[key], num_experts, own, role.expert_axis)
        elif role.expert is not None:
            if role.expert in own:
                yield model_map.renumbered(key, own.index(role.expert)), source[key]
        elif backbone:
            yield key, source[key]


def backbone_of(source: Mapping[str, Tensor], model_map: ModelMap) -> Iterator[tuple[str, Tensor]]:
    """The tensors that all sub-models have in common."""
    return ((key, source[key]) for key in source if model_map.classify(key).role in (Role.BACKBONE, Role.SHARED_EXPERT))


def _rows(key: str, w_ED: Tensor, num_experts: int, rows: Sequence[int], axis: int) -> Tensor:
    if w_ED.shape[axis] != num_experts:
        raise CheckpointError("tensor", key, f"has {w_ED.shape[axis]} rows for {num_experts} experts")
    return w_ED.index_select(axis, torch.tensor(rows))


def write_submodels(
    source: Mapping[str, Tensor],
    config: Mapping[str, Any],
    clusters: int,
    directory: Path,
    max_shard_bytes: int = SHARD_BYTES,
    order: Order | None = None,
) -> list[int]:
    """Write the backbone once, and the experts of every sub-model to `directory`/k.

    Args:
        source: Canonical tensors of the whole MoE.
        config: `config.json` values of the whole MoE.
        clusters: Number of sub-models.
        directory: Parent directory of the sub-models.
        max_shard_bytes: Maximum size of a weight file; see `write_checkpoint`.
        order: The experts of each layer, group after group; see `decompose`.

    Returns:
        Bytes of each sub-model, the backbone included.

    Raises:
        CheckpointError: The source's tensors are not those that its configuration describes.
        ConfigError: The number of experts is not divisible by the number of clusters.
    """
    model_map = ModelMap(str(config.get("model_type")))
    check_complete(source, canonical_shapes(config))
    num_experts = expert_count(config)
    values = submodel_config(config, group_size(num_experts, clusters))
    common = write_checkpoint(directory / BACKBONE, backbone_of(source, model_map), values, max_shard_bytes)
    return [
        common
        + write_checkpoint(
            directory / str(cluster),
            decompose(source, model_map, num_experts, clusters, cluster, backbone=False, order=order),
            values,
            max_shard_bytes,
            with_backbone=True,
        )
        for cluster in range(clusters)
    ]
