"""Calibrate the merged model's routers layer by layer, on its own hidden states, while its tensors are streamed.

The router's input at layer l depends on the routers of all layers before it. So the layers are calibrated in order:
compute the inputs of the router of layer l, set its rows, and run the whole layer for the inputs of layer l + 1. One
layer is on the device at a time. The hidden states are in host memory, in the dtype of the model; sums over them are
float64 on the device.

If the weights of the selected experts are not normalised to sum to one, experts that were trained at a weight of 1 get
a smaller weight after the merge. To keep the output's scale, `match_scale` multiplies a layer's `down_proj` by the mean
weight before the merge, divided by the mean weight after it.

Shapes: B documents, L sequence length, T tokens, D hidden, E experts, C clusters, g = E / C, K top-k.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import (
    ModelMap,
    Selection,
    expert_count,
    family_of,
    group_size,
    moe_blocks,
    routers,
    row_inputs,
    specialise,
    submodel_config,
)
from moedisco_ray.models.layer_stream import Step, layer_step
from moedisco_ray.models.streamed import EMBEDDING, device_of_model, loaded, streamed_model
from moedisco_ray.stages.calibration_text import Batch
from moedisco_ray.stages.merge.group_strength import group_strength
from moedisco_ray.stages.merge.router_init import (
    Statistics,
    constant_direction,
    directions,
    load_offsets,
    normalised,
    statistics,
    two_layers,
)
from moedisco_ray.stages.merge.router_load import Measured

_LEAST_CONSTANT = 1e-3


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """How routers are calibrated.

    Attributes:
        method: How each cluster's direction, which is added to the router rows of its experts, is computed: a name in
            `merge.router` (`kept` keeps the rows that the model has); or `principal`, for a seed that is copied
            into every group: no cluster's text is that of a group, so the inputs themselves are divided.
        match_load: Whether to shift the rows until each group of experts gets its cluster's share of the tokens; not
            for `kept`.
        match_scale: Whether to rescale the experts' output if the top-k weights are not normalised.
        seed: Seed of the method `random`.
        shift_RCD: Vector to add to the inputs of each of R routers for the tokens of each cluster; None: no vectors.
            See `router_shift`.
    """

    method: str
    match_load: bool = True
    match_scale: bool = True
    seed: int = 0
    shift_RCD: NDArray[np.float32] | None = None


class _RouterReachedError(Exception):
    """Stops a forward pass at the router whose inputs are collected."""


def calibrated(
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    clusters: int,
    batches: Sequence[Batch],
    *,
    settings: RouterSettings,
    report: list[dict[str, Any]],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a merged model, with calibrated router rows in place of the concatenated ones.

    The experts of sub-model k form group k. An expert's calibrated row is its row in the sub-model plus the direction
    of cluster k (see `router_init`), which is the same for the whole group. In a group of one expert, the row in the
    sub-model is untrained and counts as zero, as do the router's biases of that expert, and a first layer of the router
    is computed too. The method `kept` leaves all rows as they are.

    Args:
        tensors: Canonical tensors of the merged model: the embedding, each layer in turn, norm and head.
        config: `config.json` of the merged model.
        clusters: Number of groups of experts.
        batches: Calibration data.
        settings: How routers are calibrated.
        report: Receives one entry per MoE layer: `layer`, `scale` (factor on `down_proj`), `accuracy` (share of tokens
            whose top-1 expert is in the group of their own cluster), `top1_load_C` (share of tokens whose top-1 expert
            is in each group), `group_load_C` (share of top-k selections per group), `load_E` (share of top-k selections
            per expert), `weight_sum` (mean sum of the selected weights).
        device: Device that one layer at a time runs on.
        dtype: Dtype of the layer and its hidden states.

    Yields:
        Every tensor in its stored dtype, sorted by name within a layer, with calibrated router rows and rescaled
        `down_proj`.

    Raises:
        CheckpointError: There is no calibration data, or a cluster index is out of range.
    """
    layers = Layers(config, clusters, batches, settings=settings, device=device, dtype=dtype)
    yield from layers.through(tensors, report)


def by_layer(tensors: Iterable[tuple[str, Tensor]], names: ModelMap) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """Yield each layer's index and its tensors, sorted by name; the index of tensors outside of layers is None."""
    for layer, found in itertools.groupby(tensors, lambda item: names.classify(item[0]).layer):
        yield layer, dict(sorted(found, key=lambda item: names.sort_key(item[0])))


def _check(batches: Sequence[Batch], clusters: int) -> None:
    if not batches:
        raise CheckpointError("merge.calibration_tokens", None, "gave no calibration data; there must be some")
    if any(cluster_B.min() < 0 or cluster_B.max() >= clusters for _, cluster_B in batches):
        raise CheckpointError("clusters", clusters, "the calibration data names a cluster beyond these")


class Layers:
    """Runs the calibration data through the layers of a model, and calibrates each layer's router.

    Attributes:
        names: Names of the model's tensors.
        clusters: Number of clusters of the calibration data.
        device: Device that one layer at a time runs on.
        blocks: The MoE block of each layer that has one.
        routers: The router of each such layer.
        kind: The family's router.
        whole: How the model selects experts.
        part: How the models that its experts were trained in select theirs.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        clusters: int,
        batches: Sequence[Batch],
        *,
        settings: RouterSettings,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        _check(batches, clusters)
        self._window: dict[str, Tensor] = {}  # tensors of the current layer, from which the model reads its weights
        model = specialise(streamed_model(self._window, config, dtype=dtype, device=device, resident=False))
        self._model, self._settings, self._batches = model, settings, batches
        self.names, self.clusters, self.device = (
            ModelMap(str(config.get("model_type"))),
            clusters,
            device_of_model(model),
        )
        self.blocks, self.routers = moe_blocks(model), routers(model)
        fields, self.kind = model.config.to_dict(), family_of(model).router
        self.whole, self.part = (Selection.of(self.kind, each) for each in (fields, self.part_fields(fields)))
        self._states: list[Tensor] = []  # hidden states [B, L, D] of each batch, in host memory

    def part_fields(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """`config.json` of a model that experts were trained in, from that of the whole model."""
        return {**fields, **submodel_config(fields, expert_count(fields) // self.clusters)}

    def through(
        self, tensors: Iterable[tuple[str, Tensor]], report: list[dict[str, Any]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's tensors with the calibrated ones, and add an entry per MoE layer to the report."""
        for layer, found in by_layer(tensors, self.names):
            self._window.update(found)
            if layer is not None:
                entry = self._calibrate(layer)
                report.extend([] if entry is None else [entry])
            elif EMBEDDING in self._window:
                self._embed()
            yield from ((key, self._window[key]) for key in found)
            self._window.clear()

    def entry(self, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Calibrate the router of a layer whose weights are loaded.

        Args:
            layer: Index of the layer.
            step: Runs the layer.
            tensors: Canonical tensors of the layer; the calibrated tensors replace the old ones in it.

        Returns:
            The entry of the report.
        """
        return self._set_router(layer, step, tensors)

    @torch.no_grad()
    def _embed(self) -> None:
        """Compute the inputs of the first layer."""
        embed: Any = self._model.get_input_embeddings()
        self._states = [embed(torch.as_tensor(tokens_BL, dtype=torch.long)).cpu() for tokens_BL, _ in self._batches]

    @torch.no_grad()
    def _calibrate(self, layer: int) -> dict[str, Any] | None:
        """Calibrate a layer's router and run the layer; return the report's entry, None without experts."""
        module: Any = self._model.get_submodule(f"model.layers.{layer}")
        step = layer_step(self._model, layer)
        with loaded(module):
            entry = self.entry(layer, step, self._window) if layer in self.blocks else None
            if layer + 1 < int(self._model.config.num_hidden_layers):
                for number, hidden_BLD in enumerate(self._states):
                    self._states[number] = step(hidden_BLD.to(self.device)).cpu()
        return entry

    def _set_router(self, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        settings, key = self._settings, self.names.router_key(layer)
        router: Any = self.routers[layer]
        stored_ED = rows_ED = tensors[key]
        group = group_size(len(stored_ED), self.clusters)
        # Where no row was trained, neither was a first layer, and both layers are computed.
        fits = self.kind.hidden is not None and stored_ED.shape[1] >= len(stored_ED)
        computes_both = fits and group == 1 and settings.method != "kept"
        inputs = self.labelled_inputs(layer, step) if computes_both else self.row_inputs(layer, step)
        for name in (
            filter(None, (self.kind.bias, self.kind.correction)) if group == 1 and settings.method != "kept" else ()
        ):
            tensors[self.names.router_key(layer, name)].zero_()
            self.blocks[layer].state_dict()[self.kind.in_block(name)].zero_()
        measured = Measured(self.kind, self.whole, self.part, self.blocks[layer], self.clusters)
        own_ED = stored_ED.to(self.device, torch.float64)
        if computes_both:
            own_ED = torch.zeros(len(stored_ED), inputs[0][0].shape[1], dtype=torch.float64, device=self.device)
        if settings.method != "kept":
            total = total_of(inputs, self.clusters)
            carried_ED = own_ED if group > 1 else torch.zeros_like(own_ED)
            direction_CD = directions(settings.method, total, settings.seed + layer)
            if settings.method != "random" and self.kind.scores == "softmax":
                direction_CD *= group_strength(measured, carried_ED, direction_CD, inputs)
            if settings.match_load:
                bias_E = 0.0 if self.kind.bias is None else getattr(router, self.kind.bias).double()
                count_C = torch.ones_like(total.count_C) if settings.method == "principal" else total.count_C
                direction_CD = load_matched(
                    direction_CD, carried_ED, bias_E, inputs, dataclasses.replace(total, count_C=count_C)
                )
            rows_ED = (carried_ED + direction_CD.repeat_interleave(group, dim=0)).to("cpu", stored_ED.dtype)
            self.set_rows(layer, rows_ED, tensors, both=computes_both)
        entry = measured.on(inputs, rows_ED.to(self.device, torch.float64), own_ED)
        scaled = settings.match_scale and not _normalises(self._model)
        scale = entry.pop("branch_weight_sum") / entry["weight_sum"] if scaled else 1.0
        if scale != 1.0:
            experts: Any = self.blocks[layer].get_submodule("experts")
            experts.down_proj.mul_(scale)
            for expert in range(len(rows_ED)):
                down = self.names.expert_key(layer, expert, "down")
                tensors[down] = (tensors[down].float() * scale).to(tensors[down].dtype)
        return {"layer": layer, "scale": scale, **entry}

    def set_rows(self, layer: int, rows_ED: Tensor, tensors: dict[str, Tensor], *, both: bool) -> None:
        """Set the rows of a layer's router, in module and canonical tensors; `both`: also those of a first layer."""
        router: Any = self.routers[layer]
        key, hidden = self.names.router_key(layer), self.kind.hidden
        if both and hidden is not None:
            first = self.names.block_key(layer, f"{self.kind.module}.{hidden}")
            tensors[first], tensors[key] = two_layers(rows_ED, len(tensors[first]))
            getattr(router, hidden).copy_(tensors[first])
        else:
            tensors[key] = rows_ED
        router.get_parameter(self.kind.weight).copy_(tensors[key])

    def row_inputs(self, layer: int, step: Step) -> list[tuple[Tensor, Tensor]]:
        """What the rows of a layer's router multiply for each batch, in host memory, and the cluster of each token."""
        router, found = self.routers[layer], self.labelled_inputs(layer, step)
        return [(row_inputs(router, x_TD.to(self.device), self.kind).cpu(), cluster_T) for x_TD, cluster_T in found]

    def labelled_inputs(self, layer: int, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Inputs x_TD of a layer's router for each batch, and the cluster of each token."""
        inputs = self._router_inputs(self.blocks[layer], step)
        return [
            (self._shifted(x_TD, layer, cluster_T), cluster_T.to(self.device))
            for x_TD, cluster_T in zip(inputs, map(_labels, self._batches), strict=True)
        ]

    def _shifted(self, x_TD: Tensor, layer: int, cluster_T: Tensor) -> Tensor:
        if self._settings.shift_RCD is None:
            return x_TD
        shift_CD = torch.from_numpy(self._settings.shift_RCD[list(self.blocks).index(layer)])
        return (x_TD.float() + shift_CD[cluster_T]).to(x_TD.dtype)

    def _router_inputs(self, block: nn.Module, step: Step) -> list[Tensor]:
        """Inputs x_TD of one MoE block, for each batch, in host memory."""
        caught: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught.append(inputs[0].flatten(0, 1).cpu())
            raise _RouterReachedError

        handle = block.register_forward_pre_hook(stop)
        try:
            for hidden_BLD in self._states:
                with contextlib.suppress(_RouterReachedError):
                    step(hidden_BLD.to(self.device))
        finally:
            handle.remove()
        return caught


def _labels(batch: Batch) -> Tensor:
    """Cluster of each token of a batch [T]."""
    tokens_BL, cluster_B = batch
    return torch.as_tensor(cluster_B, dtype=torch.long).repeat_interleave(tokens_BL.shape[1])


def _normalises(model: PreTrainedModel) -> bool:
    return family_of(model).router.normalised(getattr(model.config, "norm_topk_prob", None))


def total_of(inputs: Sequence[tuple[Tensor, Tensor]], clusters: int) -> Statistics:
    """Statistics of all batches."""
    each = (statistics(x_TD.to(cluster_T.device), cluster_T, clusters) for x_TD, cluster_T in inputs)
    return functools.reduce(operator.add, each)  # holds the sums of few batches at a time


def load_matched(
    direction_CD: Tensor,
    carried_ED: Tensor,
    bias_E: Tensor | float,
    inputs: Sequence[tuple[Tensor, Tensor]],
    total: Statistics,
) -> Tensor:
    """Add a multiple of one vector v to each cluster's router row, so that top-1 loads equal the clusters' shares.

    v is chosen so that v . x > 0 for most inputs x of the router. Adding b_c v to row c adds b_c (v . x) to a token's
    logit c. Dividing all its logits by v . x > 0 keeps their order and leaves b_c as a bias, which `load_offsets`
    finds. The few tokens with v . x <= 0 are left out. The router's bias of the logits counts; its correction of the
    scores does not.
    """
    clusters = len(direction_CD)
    constant_D = constant_direction(total)
    logits = []
    for input_TD, _ in inputs:
        x_TD = input_TD.to(direction_CD.device, torch.float64)
        own_TC = (x_TD @ carried_ED.T + bias_E).view(len(x_TD), clusters, -1).amax(2)
        constant_T = x_TD @ constant_D
        positive_T = constant_T > _LEAST_CONSTANT
        logits.append((own_TC + x_TD @ direction_CD.T)[positive_T] / constant_T[positive_T, None])
    offset_C = load_offsets(torch.cat(logits), total.count_C / total.count_C.sum())
    matched_CD = direction_CD + offset_C[:, None] * constant_D
    return matched_CD if carried_ED.any() else normalised(matched_CD, total)
