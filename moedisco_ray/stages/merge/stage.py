"""The merge stage: join the sub-models' experts, combine their backbones, and calibrate the routers on data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moedisco_ray.core.config import Merge
from moedisco_ray.core.records.events import Emit, StageProgress, discard
from moedisco_ray.core.records.summaries import MergeSummary, TrainingSummary
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.models import BACKBONE, ModelMap, canonical_shapes, expert_count, write_checkpoint
from moedisco_ray.models.initial_weights import with_seed
from moedisco_ray.models.optimizer_state import OPTIMIZER_FOLDER, open_optimizer_state, write_optimizer_state
from moedisco_ray.stages.calibration_text import Batch, calibration, in_smaller_batches, sample
from moedisco_ray.stages.context import COMMON, Context, device_of
from moedisco_ray.stages.expert_use import FILE, read_order
from moedisco_ray.stages.merge.backbone import backbone_rule, merge_weights
from moedisco_ray.stages.merge.build import build_merged
from moedisco_ray.stages.merge.calibrate import RouterSettings, calibrated
from moedisco_ray.stages.merge.optimizer_state import merge_optimizer_states
from moedisco_ray.stages.merge.router_shift import router_shift, shifts_of_clusters
from moedisco_ray.stages.scoring import default_dtype
from moedisco_ray.stages.start import Start, untrained_moe, whole_moe


def run(context: Context, draft: Draft) -> None:
    """Merge the trained sub-models.

    In a run without sub-models the result is the initial MoE, with the trained seed in it if there is one (sparse
    upcycling).
    """
    config = context.config
    pool = config.finetune_pool
    if not config.tokens.decoupled:
        windows = sample(context)
        result = context.call(
            pool,
            Files([context.start.tokenizer, *filter(None, [context.trained_seed])], [draft.path]),
            write_whole,
            context.start,
            clusters=config.cluster_count,
            trained_seed=context.trained_seed,
            batches=windows,
            smaller={"batches": in_smaller_batches(windows)},
            settings=config.merge,
            keep_optimizer_state=config.finetune.keep_optimizer_state,
            device=device_of(pool),
            directory=draft.path,
        )
        draft.summary.update(MergeSummary.model_validate(result).to_json())
        return
    common = context.of("submodels") / COMMON
    if not context.store.has(common):
        common = context.of("decompose") / BACKBONE
    experts = context.of("decompose") / FILE
    order = experts if context.store.has(experts) else None  # absent where sub-models have their experts by index
    batches = calibration(context)
    shifts = _shifts(context, batches)
    result = context.call_with_events(
        pool,
        Files([context.start.tokenizer, *context.submodels, common, *filter(None, [order])], [draft.path]),
        merge_submodels,
        context.start,
        submodels=context.submodels,
        common=common,
        tokens=[unit.tokens for unit in context.summary("submodels", TrainingSummary).units],
        batches=batches,
        smaller={"batches": in_smaller_batches(batches)},
        settings=config.merge,
        keep_optimizer_state=config.finetune.keep_optimizer_state,
        device=device_of(pool),
        directory=draft.path,
        shift_RCD=shifts_of_clusters(shifts, config.cluster_count),
        order=order,
    )
    if shifts:
        result["left"] = [
            {"owner": config.owner_of(k), "what": f"mean inputs of {len(shift_RD)} routers", "bytes": shift_RD.nbytes}
            for k, shift_RD in shifts.items()
        ]
    draft.summary.update(MergeSummary.model_validate(result).to_json())


def _shifts(context: Context, batches: Sequence[Batch]) -> dict[int, NDArray[np.float32]]:
    """The `router_shift` of each data owner, by its cluster; empty if routers are not computed from data."""
    config, shards, shifts = context.config, context.of("corpus") / "shards", {}
    if not config.merge.from_data(from_moe=config.model.starts_from_moe):
        return {}
    for owner in context.owners:
        submodel = context.submodels[owner.cluster]
        shifts[owner.cluster] = context.call(
            owner.pool,
            Files([submodel, shards]),
            router_shift,
            submodel,
            owner_store=owner.store,
            shards=shards,
            windows=sum(len(cluster_B) for _, cluster_B in batches if cluster_B[0] == owner.cluster),
            sequence_length=config.corpus.sequence_length,
            device=device_of(owner.pool),
        )
    return shifts


def merge_submodels(
    start: Start,
    *,
    submodels: Sequence[Path],
    common: Path,
    tokens: Sequence[int],
    batches: Sequence[Batch],
    settings: Merge,
    keep_optimizer_state: bool,
    device: str,
    directory: Path,
    shift_RCD: NDArray[np.float32] | None = None,
    order: Path | None = None,
    events: Emit = discard,
) -> dict[str, Any]:
    """Write the merged MoE with its calibrated router.

    Args:
        start: Settings and files of the untrained MoE. Its seed also decides random router rows.
        submodels: The trained sub-models, in the clusters' order.
        common: The backbone that all sub-models started from, or had in common at their last sync point.
        tokens: Tokens that each sub-model was trained on.
        batches: Calibration data.
        settings: The run's merge section.
        keep_optimizer_state: Whether the sub-models' optimizer states are merged too.
        device: Device that the merged model runs on.
        directory: Directory of the merged model.
        shift_RCD: Vectors from which the router rows of data owners are computed, in place of their text; see
            `RouterSettings`.
        order: `experts.json` of the untrained sub-models: every expert returns to its place in the start. None: the
            sub-models have their experts by index.
        events: Takes `stage_progress` events.

    Returns:
        Figures per layer; `merge.json` next to the model also lists the origin of each tensor.
    """
    _, config = untrained_moe(start)
    from_moe = start.model.starts_from_moe
    from_data = settings.from_data(from_moe=from_moe)
    places = read_order(order)
    router = RouterSettings(settings.method(from_moe=from_moe), from_data, from_data, start.seed, shift_RCD)
    result = build_merged(
        submodels,
        common,
        config,
        merge_weights(settings.backbone, tokens),
        batches,
        directory=directory,
        router=router,
        change=backbone_rule(settings.backbone).change,
        device=device,
        advance=StageProgress(events, "merge", "tensors merged", len(canonical_shapes(config))).add,
        order=places,
    )
    if keep_optimizer_state:
        merge_optimizer_states(submodels, config, merge_weights("token_weighted", tokens), directory, places)
    return {**result, "tensors": len(result["tensors"])}


def write_whole(
    start: Start,
    *,
    clusters: int,
    trained_seed: Path | None,
    batches: Sequence[Batch],
    settings: Merge,
    keep_optimizer_state: bool,
    device: str,
    directory: Path,
) -> dict[str, Any]:
    """Write the MoE that is trained without sub-models: the initial one, or the upcycled seed.

    Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) copies the seed's experts into every group. Router rows are
    random if the seed has one expert, and else copied. If routers are computed from data, a direction per group divides
    the router's inputs, so that a token selects experts of one group, and experts are rescaled as in a merge; see the
    module `calibrate`. Otherwise rows get noise (Expert Upcycling, arXiv 2604.19835).

    Args:
        start: Settings and files of the untrained MoE.
        clusters: Number of groups of experts in the MoE; the seed model has the first group.
        trained_seed: The seed model; None if none was trained.
        batches: Text on which the output scale is measured; all of it counts as cluster 0.
        settings: The run's merge section.
        keep_optimizer_state: Whether the seed's optimizer state is upcycled too.
        device: Device that the MoE runs on.
        directory: Directory of the MoE.

    Returns:
        `layers`: figures per router, if there is a seed.
    """
    from_data = settings.from_data(from_moe=start.model.starts_from_moe)
    whole, config = whole_moe(start, trained_seed, distinct_rows=not from_data)
    if trained_seed is None:
        write_checkpoint(directory, whole.items(), config)
        return {"layers": []}
    names = ModelMap(start.model.family_name)
    layers: list[dict[str, Any]] = []
    divides = from_data and expert_count(config) > clusters
    router = RouterSettings("principal" if divides else "kept", match_scale=from_data, seed=start.seed)
    write_checkpoint(
        directory,
        calibrated(
            whole.items(),
            config,
            clusters,
            batches,
            settings=router,
            report=layers,
            device=device,
            dtype=default_dtype(device),
        ),
        config,
    )
    optimizer_state = open_optimizer_state(trained_seed / OPTIMIZER_FOLDER) if keep_optimizer_state else None
    if optimizer_state is not None:
        zeros = {key: torch.zeros(()).expand(shape) for key, shape in canonical_shapes(config).items()}
        tensors = optimizer_state.tensors
        write_optimizer_state(
            directory / OPTIMIZER_FOLDER,
            lambda kind: with_seed(tensors[kind], zeros, names, distinct_rows=True).items(),
            optimizer_state.steps,
            config,
        )
    return {"layers": layers}
