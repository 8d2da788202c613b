"""Build the merged model's directory from the sub-models' directories."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.artifacts import write_json
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.events import Advance, no_advance
from moedisco_ray.models import (
    Checkpoint,
    ModelMap,
    Role,
    canonical_shapes,
    check_complete,
    check_experts,
    expert_count,
    load_model,
    model_tensors,
    open_checkpoint,
    specialise,
    write_checkpoint,
)
from moedisco_ray.stages.merge.calibrate import Batch, RouterSettings, calibrate
from moedisco_ray.stages.merge.tensors import TensorReport, merge

_JOINED = ".joined"


def build_merged(
    submodels: Sequence[Path], start: Path, config: Mapping[str, Any], weights: Sequence[float], batches: Sequence[Batch], *,
    directory: Path, router: RouterSettings, device: str = "cpu", advance: Advance = no_advance,
) -> dict[str, Any]:
    """Merge trained sub-models and calibrate the routers.

    The first pass joins the tensors as a stream. The second pass loads the joined model, calibrates its routers, and writes it
    again with the changed tensors; it holds the merged model in memory once.

    Args:
        submodels: Directories of the sub-models, in the clusters' order.
        start: The backbone that all of them started from, or had in common at their last sync point.
        config: `config.json` of the whole MoE, with its own number of experts and top-k.
        weights: Weight of each sub-model in the backbone; they sum to 1.
        batches: Calibration data: token ids of B windows [B, L], and the cluster of each window [B].
        directory: Directory of the merged model and of `merge.json`.
        router: How routers are calibrated.
        device: Device that the merged model runs on and must fit.
        advance: Receives the number of tensors merged.

    Returns:
        Content of `merge.json`: `weights`, `tensors` (one entry each), `layers` (one entry per router).

    Raises:
        CheckpointError: A sub-model is of another family, or the joined tensors are not exactly those of the MoE.
    """
    model_map = ModelMap(str(config.get("model_type")))
    opened = [_open(path, model_map) for path in submodels]
    origin = _open(start, model_map)
    reports: list[TensorReport] = []
    joined = directory / _JOINED

    def stream() -> Iterator[tuple[str, Tensor]]:
        for tensor, entry in merge(opened, origin, model_map, weights):
            reports.append(entry)
            advance(1)
            yield entry.key, tensor

    write_checkpoint(joined, stream(), config)
    stored = open_checkpoint(joined)
    check_complete(stored, canonical_shapes(config))
    check_experts(stored, model_map, expert_count(config))

    model = specialise(load_model(joined).to(device))
    layers = calibrate(model, len(submodels), batches, router)
    write_checkpoint(directory, _overlaid(stored, model, layers), config)
    del stored
    shutil.rmtree(joined)

    result = {"weights": list(weights), "tensors": [entry.to_dict() for entry in reports], "layers": layers}
    write_json(directory / "merge.json", result)
    return result


def _open(directory: Path, model_map: ModelMap) -> Checkpoint:
    opened = open_checkpoint(directory)
    if opened.model_map.family != model_map.family:
        raise CheckpointError("submodels", str(directory), f"is of family {opened.model_map.family.name}, not "
                              f"{model_map.family.name}")
    return opened


def _overlaid(stored: Checkpoint, model: PreTrainedModel, layers: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors, with those that the calibration changed taken from the model in memory."""
    rescaled = {entry["layer"] for entry in layers if entry["scale"] != 1.0}
    changed = dict(model_tensors(model))
    for key in stored:
        role = stored.model_map.classify(key)
        kept = stored[key]
        if role.role is Role.ROUTER or (role.role is Role.EXPERT and role.part == "down" and role.layer in rescaled):
            yield key, changed[key].to("cpu", kept.dtype)
        else:
            yield key, kept
