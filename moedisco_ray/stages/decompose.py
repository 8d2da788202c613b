"""The decompose stage: it cuts the MoE into one sub-model per cluster, tensor by tensor.

Sub-model k of C has the whole backbone and shared expert, and the k-th group of g = E / C routed experts of every layer
with their router rows, renumbered from 0. It is a model of the same family; with g = 1 it is equivalent to a dense
model. If the family's own router limits each token to some groups of experts, a sub-model has whole such groups, or a
part of one.

In a run that starts from a trained MoE, a sub-model has the experts that its cluster's text selects most, see
`expert_use`, and the merge puts them back in their places. Groups stay those by index where text stays with data
owners, where the merge computes routers anew, and where the family's router limits tokens to groups of experts.

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

import torch
from torch import Tensor

from moedisco_ray.core.config import derived
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.limits import SHARD_BYTES
from moedisco_ray.core.records.summaries import DecomposeSummary
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
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.models.expert_order import Order
from moedisco_ray.stages.context import Context, device_of
from moedisco_ray.stages.expert_use import FILE, SHARES, expert_use, order_in, samples
from moedisco_ray.stages.merge.calibration_text import in_smaller_batches
from moedisco_ray.stages.start import Start, untrained_moe, whole_moe


def run(context: Context, draft: Draft) -> None:
    """Cut the MoE into one sub-model per cluster; do nothing in a run without sub-models."""
    config, pool = context.config, context.config.pools.low_memory
    if not config.tokens.decoupled:
        return
    use = None
    if derived.experts_by_use(config):
        batches = samples(context)
        use = context.call(
            pool,
            Files([context.start.tokenizer]),
            expert_use,
            context.start,
            batches=batches,
            clusters=config.cluster_count,
            device=device_of(pool),
            smaller={"batches": in_smaller_batches(batches)},
        )
    written = context.call(
        None,
        Files([context.start.tokenizer, *filter(None, [context.trained_seed])], [draft.path]),
        write_untrained_submodels,
        context.start,
        clusters=config.cluster_count,
        trained_seed=context.trained_seed,
        directory=draft.path,
        use=use,
    )
    draft.summary.update(DecomposeSummary.model_validate(written).to_json())


def write_untrained_submodels(
    start: Start, *, clusters: int, trained_seed: Path | None, directory: Path, use: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the sub-models with their initial weights, which come from the trained seed if there is one.

    Args:
        start: Settings and files of the untrained MoE.
        clusters: Number of sub-models.
        trained_seed: The trained seed model; None if none was trained.
        directory: Parent directory of the sub-models.
        use: Which experts each sub-model gets, see `expert_use`, which is written next to the sub-models; None: its
            group by index.

    Returns:
        `bytes`: the size of each sub-model; and the shares of `expert_use`.
    """
    source, config = whole_moe(start, trained_seed)
    if use is None:
        return {"bytes": write_submodels(source, config, clusters, directory)}
    sizes = write_submodels(source, config, clusters, directory, order=order_in(use))
    write_json(directory / FILE, use)
    return {"bytes": sizes, **{name: use[name] for name in SHARES}}


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
