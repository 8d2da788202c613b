"""Build the merged model's directory from the sub-models' directories."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.records.events import Advance, no_advance
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.models import (
    Checkpoint,
    ModelMap,
    Stored,
    canonical_shapes,
    check_complete,
    check_experts,
    expert_count,
    open_checkpoint,
    reading_thread,
    reused_memory,
    write_checkpoint,
)
from moedisco_ray.models.expert_order import Order, inverted, reordered_by_layer, source_name
from moedisco_ray.stages.calibration_text import Batch
from moedisco_ray.stages.merge.backbone import Change, weighted_mean
from moedisco_ray.stages.merge.calibrate import RouterSettings, by_layer, calibrated
from moedisco_ray.stages.merge.tensors import TensorReport, merge
from moedisco_ray.stages.scoring import default_dtype


class OpenModel(Mapping[str, Tensor]):
    """Canonical tensors of a sub-model that is no checkpoint, read on access."""

    model_map: ModelMap

    @abc.abstractmethod
    def layout(self) -> dict[str, Stored]:
        """Shape and dtype of every tensor, in order."""

    @abc.abstractmethod
    def read_ahead(self, keys: Iterable[str], reader: Executor) -> None:
        """Start reading tensors into the page cache; see `Checkpoint.read_ahead`."""


SubModel = Checkpoint | OpenModel


def build_merged(
    submodels: Sequence[Path],
    start: Path,
    config: Mapping[str, Any],
    weights: Sequence[float],
    batches: Sequence[Batch],
    *,
    directory: Path,
    router: RouterSettings,
    change: Change = weighted_mean,
    device: str = "cpu",
    advance: Advance = no_advance,
    order: Order | None = None,
) -> dict[str, Any]:
    """Merge trained sub-models and calibrate the routers.

    Tensors are joined, calibrated and written layer by layer; one layer is in memory at a time.

    Args:
        submodels: Directories of the sub-models, in the clusters' order.
        start: The backbone that all sub-models started from, or had in common at their last sync point.
        config: `config.json` of the whole MoE.
        weights: Weight of each sub-model in the merged backbone; the weights sum to 1.
        batches: Calibration data: token ids of B windows [B, L], and the cluster of each window [B].
        directory: Directory of the merged model and of `merge.json`.
        router: How routers are calibrated.
        change: How the deltas of a backbone tensor are combined.
        device: Device that the merged model runs on, one layer at a time.
        advance: Receives the number of tensors merged.
        order: Per layer, the place in the merged model of each of the sub-models' experts, one sub-model after the
            other; layers that it leaves out have them in this order.

    Returns:
        Content of `merge.json`: `weights`, `tensors` (one entry per tensor), `layers` (one entry per router).

    Raises:
        CheckpointError: A sub-model is of another family, or the joined tensors are not exactly those of the MoE.
    """
    model_map = ModelMap(str(config.get("model_type")))
    opened = [_open(path, model_map) for path in submodels]
    with reused_memory(device):
        return write_merged(
            opened,
            _open(start, model_map),
            config,
            weights,
            batches,
            directory=directory,
            router=router,
            change=change,
            device=device,
            advance=advance,
            order=order,
        )


def write_merged(
    submodels: Sequence[SubModel],
    start: SubModel,
    config: Mapping[str, Any],
    weights: Sequence[float],
    batches: Sequence[Batch],
    *,
    directory: Path,
    router: RouterSettings | None,
    change: Change = weighted_mean,
    device: str = "cpu",
    advance: Advance = no_advance,
    order: Order | None = None,
) -> dict[str, Any]:
    """Like `build_merged`, for sub-models that are open.

    With `router=None` the routers keep the rows of the sub-models.
    """
    model_map = ModelMap(str(config.get("model_type")))
    order = order or {}
    layout = merged_layout(submodels, config, order)
    reports: list[TensorReport] = []
    layers: list[dict[str, Any]] = []

    def joined(reader: Executor) -> Iterator[tuple[str, Tensor]]:
        read_ahead = _ReadAhead([*submodels, start], reader)
        for tensor, entry in merge(submodels, start, model_map, weights, change):
            read_ahead.at(model_map.classify(entry.key).layer)
            reports.append(dataclasses.replace(entry, key=source_name(entry.key, model_map, order)))
            advance(1)
            yield entry.key, tensor

    with reading_thread() as reader:
        if router is None:
            finished: Iterator[tuple[str, Tensor]] = (
                item for _, layer in by_layer(joined(reader), model_map) for item in layer.items()
            )
        else:
            finished = calibrated(
                joined(reader),
                config,
                len(submodels),
                batches,
                settings=router,
                report=layers,
                device=device,
                dtype=default_dtype(device),
            )
        # Routers are calibrated while each sub-model's experts are neighbours.
        finished = reordered_by_layer(finished, model_map, inverted(order), layout)
        write_checkpoint(directory, finished, config, layout=layout)

    for entry in (each for each in layers if each["layer"] in order):
        places = inverted(order)[entry["layer"]]
        entry["load_E"] = [entry["load_E"][place] for place in places]
    result = {"weights": list(weights), "tensors": [each.to_dict() for each in reports], "layers": layers}
    write_json(directory / "merge.json", result)
    return result


def _open(directory: Path, model_map: ModelMap) -> Checkpoint:
    opened = open_checkpoint(directory)
    if opened.model_map.family != model_map.family:
        raise CheckpointError(
            "submodels", str(directory), f"is of family {opened.model_map.family.name}, not {model_map.family.name}"
        )
    return opened


def merged_layout(
    submodels: Sequence[SubModel], config: Mapping[str, Any], order: Order | None = None
) -> dict[str, Stored]:
    """Shape and dtype of every tensor of the merged model; dtypes are those of the first sub-model."""
    shapes, first = canonical_shapes(config), submodels[0]
    names = first.model_map
    groups = names.experts(first)
    stored = first.layout()
    dtypes: dict[str, torch.dtype] = {}
    for key, (_, dtype) in stored.items():
        role = names.classify(key)
        keys = [key]
        if role.layer is not None and role.expert is not None:
            places = (k * groups[role.layer] + role.expert for k in range(len(submodels)))
            keys = [source_name(names.renumbered(key, place), names, order or {}) for place in places]
        dtypes.update(dict.fromkeys(keys, dtype))
    check_complete(dtypes, shapes)
    check_experts(dtypes, names, expert_count(config))
    return {key: Stored(shape, dtypes[key]) for key, shape in shapes.items()}


class _ReadAhead:
    """Reads each layer of some checkpoints into the page cache while the previous layer is merged."""

    def __init__(self, checkpoints: Sequence[SubModel], reader: Executor) -> None:
        self._checkpoints, self._reader = checkpoints, reader
        self._announced = -1
        self._keys: dict[int | None, list[str]] = {}
        for key in checkpoints[0]:  # all sub-models have the same names
            self._keys.setdefault(checkpoints[0].model_map.classify(key).layer, []).append(key)

    def at(self, layer: int | None) -> None:
        """Start to read the layer after `layer`, unless that has been done."""
        following = 0 if layer is None else layer + 1
        if following <= self._announced:
            return
        self._announced = following
        for stored in self._checkpoints:
            stored.read_ahead((key for key in self._keys.get(following, ()) if key in stored), self._reader)
