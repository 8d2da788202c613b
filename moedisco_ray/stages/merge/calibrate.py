"""Calibrate the merged model's routers layer by layer, on its own hidden states, while its tensors are streamed.

The router's input at layer l depends on the routers of all layers before it. So the layers are calibrated in order: compute the
inputs of the router of layer l, set its rows, and run the whole layer for the inputs of layer l + 1. One layer is on the device at
a time. The hidden states are in host memory, in the dtype of the model; sums over them are float64 on the device.

If the weights of the selected experts are not normalised to sum to one, experts that were trained at a weight of 1 get a smaller
weight after the merge. To keep the output's scale, `match_scale` multiplies a layer's `down_proj` by the mean weight before the
merge, divided by the mean weight after it.

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
    Checkpoint,
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
from moedisco_ray.stages.merge.group_strength import group_strength
from moedisco_ray.stages.merge.new_rows import new_rows, use_of_new
from moedisco_ray.stages.merge.refit import add_to_down, down_changes, routed_outputs
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

Batch = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Tokens [B, L] and the cluster of each document [B]."""

_LEAST_CONSTANT = 1e-3


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """How routers are calibrated.

    Attributes:
        method: How each cluster's direction, which is added to the router rows of its experts, is computed: a name in
            `merge.router`; `concat`, which keeps the rows that the model has; or `principal`, for a seed that is copied into
            every group: no cluster's text is that of a group, so the inputs themselves are divided.
        match_load: Whether to shift the rows until each group of experts gets its cluster's share of the tokens; not for `concat`.
        match_scale: Whether to rescale the experts' output if the top-k weights are not normalised.
        seed: Seed of the method `random`.
        shift_RCD: Vector to add to the inputs of each of R routers for the tokens of each cluster; None: no vectors. See
            `router_shift`.
        new: Experts whose rows alone are computed, see `new_rows`. Cluster 0 is the text of all others, cluster n that of the
            n-th new expert. No other setting counts then.
    """

    method: str
    match_load: bool = True
    match_scale: bool = True
    seed: int = 0
    shift_RCD: NDArray[np.float32] | None = None
    new: tuple[int, ...] = ()


class _RouterReachedError(Exception):
    """Stops a forward pass at the router whose inputs are collected."""


def calibrated(
    tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], clusters: int, batches: Sequence[Batch], *,
    settings: RouterSettings, report: list[dict[str, Any]], device: str = "cpu", dtype: torch.dtype = torch.float32,
    whole: Checkpoint | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a merged model, with calibrated router rows in place of the concatenated ones.

    The experts of sub-model k form group k. An expert's calibrated row is its row in the sub-model plus the direction of cluster k
    (see `router_init`), which is the same for the whole group. In a group of one expert, the row in the sub-model is untrained and
    counts as zero, as do the router's biases of that expert, and a first layer of the router is computed too. The method `concat`
    leaves all rows as they are.

    Args:
        tensors: Canonical tensors of the merged model: the embedding, each layer in turn, norm and head.
        config: `config.json` of the merged model.
        clusters: Number of groups of experts.
        batches: Calibration data.
        settings: How routers are calibrated.
        report: Receives one entry per MoE layer: `layer`, `scale` (factor on `down_proj`), `accuracy` (share of tokens whose top-1
            expert is in the group of their own cluster), `top1_load_C` (share of tokens whose top-1 expert is in each group),
            `group_load_C` (share of top-k selections per group), `load_E` (share of top-k selections per expert), `weight_sum`
            (mean sum of the selected weights).
        device: Device that one layer at a time runs on.
        dtype: Dtype of the layer and its hidden states.
        whole: A model with more experts or a higher top-k, to whose outputs on the text of cluster 0 the experts are refitted (see
            `refit`). Of the router, new rows alone are computed then. None: no refit.

    Yields:
        Every tensor in its stored dtype, sorted by name within a layer, with calibrated router rows and rescaled `down_proj`.

    Raises:
        CheckpointError: There is no calibration data, or a cluster index is out of range.
    """
    _check(batches, clusters)
    names = ModelMap(str(config.get("model_type")))
    window: dict[str, Tensor] = {}      # tensors of the current layer, from which the model below reads its weights
    model = specialise(streamed_model(window, config, dtype=dtype, device=device, resident=False))
    layers = _Layers(model, names, clusters, batches, settings, whole=None if whole is None else specialise(
        streamed_model(whole, whole.config, dtype=dtype, device=device, resident=False)))
    for layer, found in by_layer(tensors, names):
        window.update(found)
        if layer is not None:
            entry = layers.calibrate(layer, window)
            report.extend([] if entry is None else [entry])
        elif EMBEDDING in window:
            layers.embed()
        yield from ((key, window[key]) for key in found)
        window.clear()


def by_layer(tensors: Iterable[tuple[str, Tensor]], names: ModelMap) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """Yield the index and the tensors, sorted by name, of each layer; the index of tensors outside of the layers is None."""
    for layer, found in itertools.groupby(tensors, lambda item: names.classify(item[0]).layer):
        yield layer, dict(sorted(found, key=lambda item: names.sort_key(item[0])))


def _check(batches: Sequence[Batch], clusters: int) -> None:
    if not batches:
        raise CheckpointError("merge.calibration_tokens", None, "gave no calibration data; there must be some")
    if any(cluster_B.min() < 0 or cluster_B.max() >= clusters for _, cluster_B in batches):
        raise CheckpointError("clusters", clusters, "the calibration data names a cluster beyond these")


class _Layers:
    """Runs the calibration data through the layers of a model, and calibrates each layer's router."""

    def __init__(
        self, model: PreTrainedModel, names: ModelMap, clusters: int, batches: Sequence[Batch], settings: RouterSettings, *,
        whole: PreTrainedModel | None = None,
    ) -> None:
        self._model, self._names, self._clusters, self._settings, self._larger = model, names, clusters, settings, whole
        self._batches, self._device = batches, device_of_model(model)
        self._blocks, self._routers = moe_blocks(model), routers(model)
        fields, self._kind = model.config.to_dict(), family_of(model).router
        part = {} if settings.new or whole is not None else submodel_config(fields, expert_count(fields) // clusters)
        self._whole, self._part = Selection.of(self._kind, fields), Selection.of(self._kind, fields | part)
        self._states: list[Tensor] = []     # hidden states [B, L, D] of each batch, in host memory

    @torch.no_grad()
    def embed(self) -> None:
        """Compute the inputs of the first layer."""
        embed: Any = self._model.get_input_embeddings()
        self._states = [embed(torch.as_tensor(tokens_BL, dtype=torch.long)).cpu() for tokens_BL, _ in self._batches]

    @torch.no_grad()
    def calibrate(self, layer: int, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Calibrate a layer's router and run the layer; return the entry of the report, None for a layer without experts.

        Args:
            layer: Index of the layer.
            tensors: Canonical tensors of the layer; the calibrated tensors replace the old ones in it.
        """
        module: Any = self._model.get_submodule(f"model.layers.{layer}")
        step = layer_step(self._model, layer)
        with loaded(module):
            entry = self._entry(layer, step, tensors) if layer in self._blocks else None
            if layer + 1 < int(self._model.config.num_hidden_layers):
                for number, hidden_BLD in enumerate(self._states):
                    self._states[number] = step(hidden_BLD.to(self._device)).cpu()
        return entry

    def _entry(self, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if self._larger is None:
            return (self._set_new_rows if self._settings.new else self._set_router)(layer, step, tensors)
        found = self._set_new_rows(layer, step, tensors) if self._settings.new else {"layer": layer}
        return found | self._refit(self._larger, layer, step, tensors)

    def _refit(self, larger: PreTrainedModel, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        experts, router = self._blocks[layer].get_submodule("experts"), self._routers[layer]
        x_TD = torch.cat([x_TD[(cluster_T == 0).cpu()] for x_TD, cluster_T in self._labelled_inputs(layer, step)]).to(self._device)
        with loaded(larger.get_submodule(f"model.layers.{layer}")):
            target_TD = routed_outputs(moe_blocks(larger)[layer].get_submodule("experts"), routers(larger)[layer], x_TD)

        def error() -> float:
            """Mean square of the error, as a share of that of the target."""
            error_TD = routed_outputs(experts, router, x_TD).float() - target_TD.float()
            return float(error_TD.square().mean() / target_TD.float().square().mean())

        before = error()
        for expert, change_FD in down_changes(experts, router, x_TD, target_TD).items():
            add_to_down(experts, self._names, layer, expert, change_FD, tensors=tensors)
        return {"error_before": before, "error": error()}

    def _set_router(self, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        settings, key = self._settings, self._names.router_key(layer)
        router: Any = self._routers[layer]
        stored_ED = rows_ED = tensors[key]
        group = group_size(len(stored_ED), self._clusters)
        # Where no row was trained, neither was a first layer, and both layers are computed.
        fits = self._kind.hidden is not None and stored_ED.shape[1] >= len(stored_ED)
        computes_both = fits and group == 1 and settings.method != "concat"
        inputs = self._labelled_inputs(layer, step) if computes_both else self._row_inputs(layer, step)
        for name in filter(None, (self._kind.bias, self._kind.correction)) if group == 1 and settings.method != "concat" else ():
            tensors[self._names.router_key(layer, name)].zero_()
            router.state_dict()[name].zero_()
        measured = Measured(self._kind, self._whole, self._part, router, self._clusters)
        own_ED = stored_ED.to(self._device, torch.float64)
        if computes_both:
            own_ED = torch.zeros(len(stored_ED), inputs[0][0].shape[1], dtype=torch.float64, device=self._device)
        if settings.method != "concat":
            total = _total(inputs, self._clusters)
            carried_ED = own_ED if group > 1 else torch.zeros_like(own_ED)
            direction_CD = directions(settings.method, total, settings.seed + layer)
            if settings.method != "random" and self._kind.scores == "softmax":
                direction_CD *= group_strength(measured, carried_ED, direction_CD, inputs)
            if settings.match_load:
                bias_E = 0.0 if self._kind.bias is None else getattr(router, self._kind.bias).double()
                count_C = torch.ones_like(total.count_C) if settings.method == "principal" else total.count_C
                direction_CD = _load_matched(direction_CD, carried_ED, bias_E, inputs, dataclasses.replace(total, count_C=count_C))
            rows_ED = (carried_ED + direction_CD.repeat_interleave(group, dim=0)).to("cpu", stored_ED.dtype)
            self._set_rows(layer, rows_ED, tensors, both=computes_both)
        entry = measured.on(inputs, rows_ED.to(self._device, torch.float64), own_ED)
        scaled = settings.match_scale and not _normalises(self._model)
        scale = entry.pop("branch_weight_sum") / entry["weight_sum"] if scaled else 1.0
        if scale != 1.0:
            experts: Any = self._blocks[layer].get_submodule("experts")
            experts.down_proj.mul_(scale)
            for expert in range(len(rows_ED)):
                down = self._names.expert_key(layer, expert, "down")
                tensors[down] = (tensors[down].float() * scale).to(tensors[down].dtype)
        return {"layer": layer, "scale": scale, **entry}

    def _set_rows(self, layer: int, rows_ED: Tensor, tensors: dict[str, Tensor], *, both: bool) -> None:
        router: Any = self._routers[layer]
        key, hidden = self._names.router_key(layer), self._kind.hidden
        if both and hidden is not None:
            first = self._names.block_key(layer, f"{self._kind.module}.{hidden}")
            tensors[first], tensors[key] = two_layers(rows_ED, len(tensors[first]))
            getattr(router, hidden).copy_(tensors[first])
        else:
            tensors[key] = rows_ED
        router.weight.copy_(tensors[key])

    def _set_new_rows(self, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        key, new, inputs = self._names.router_key(layer), list(self._settings.new), self._row_inputs(layer, step)
        router: Any = self._routers[layer]
        others = [expert for expert in range(len(tensors[key])) if expert not in new]
        for name in filter(None, (self._kind.bias, self._kind.correction)):     # a new expert has the others' mean
            stored, axis = tensors[self._names.router_key(layer, name)], self._names.family.expert_axis(name)
            mean = stored.index_select(axis, torch.tensor(others)).mean(axis, keepdim=True)
            for expert in new:
                stored.narrow(axis, expert, 1).copy_(mean)
            router.state_dict()[name].copy_(stored)
        bias_E = torch.zeros(len(tensors[key])) if self._kind.bias is None else getattr(router, self._kind.bias)
        bias_E = bias_E.to(self._device, torch.float64)
        rows_ED, total, top_k = tensors[key].to(self._device, torch.float64), _total(inputs, self._clusters), self._whole.top_k
        unmatched_CD = directions("ridge", total, 0)
        matched_CD = _load_matched(unmatched_CD, torch.zeros_like(unmatched_CD), 0.0, inputs, total)
        measured = Measured(self._kind, self._whole, self._part, router, self._clusters)
        correction_E = None if measured.correction_E is None else measured.correction_E[others]
        rows_ED[new], scale = new_rows(
            rows_ED[others], bias_E[others], matched_CD, inputs, router=self._kind, top_k=top_k, correction_E=correction_E)
        self._set_rows(layer, rows_ED.to("cpu", tensors[key].dtype), tensors, both=False)
        own, *of_new = use_of_new(lambda x_TD: measured.selected(x_TD, rows_ED)[0], new, inputs)
        return {"layer": layer, "scale": scale, "use_on_own_text": own, "use_on_new_texts": of_new}

    def _row_inputs(self, layer: int, step: Step) -> list[tuple[Tensor, Tensor]]:
        """What the rows of a layer's router multiply for each batch, in host memory, and the cluster of each token."""
        router, found = self._routers[layer], self._labelled_inputs(layer, step)
        return [(row_inputs(router, x_TD.to(self._device), self._kind).cpu(), cluster_T) for x_TD, cluster_T in found]

    def _labelled_inputs(self, layer: int, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Inputs x_TD of a layer's router for each batch, and the cluster of each token."""
        return [
            (self._shifted(x_TD, layer, cluster_T), cluster_T.to(self._device))
            for x_TD, cluster_T in zip(self._router_inputs(self._blocks[layer], step), map(_labels, self._batches), strict=True)]

    def _shifted(self, x_TD: Tensor, layer: int, cluster_T: Tensor) -> Tensor:
        if self._settings.shift_RCD is None:
            return x_TD
        shift_CD = torch.from_numpy(self._settings.shift_RCD[list(self._blocks).index(layer)])
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
                    step(hidden_BLD.to(self._device))
        finally:
            handle.remove()
        return caught


def _labels(batch: Batch) -> Tensor:
    """Cluster of each token of a batch [T]."""
    tokens_BL, cluster_B = batch
    return torch.as_tensor(cluster_B, dtype=torch.long).repeat_interleave(tokens_BL.shape[1])


def _normalises(model: PreTrainedModel) -> bool:
    return family_of(model).router.normalised(getattr(model.config, "norm_topk_prob", None))


def _total(inputs: Sequence[tuple[Tensor, Tensor]], clusters: int) -> Statistics:
    each = (statistics(x_TD.to(cluster_T.device), cluster_T, clusters) for x_TD, cluster_T in inputs)
    return functools.reduce(operator.add, each)     # holds the sums of few batches at a time


def _load_matched(
    direction_CD: Tensor, carried_ED: Tensor, bias_E: Tensor | float, inputs: Sequence[tuple[Tensor, Tensor]], total: Statistics,
) -> Tensor:
    """Add a multiple of one vector v to each cluster's router row, so that top-1 loads equal the clusters' shares.

    v is chosen so that v . x > 0 for most inputs x of the router. Adding b_c v to row c adds b_c (v . x) to a token's logit c.
    Dividing all its logits by v . x > 0 keeps their order and leaves b_c as a bias, which `load_offsets` finds. The few tokens with
    v . x <= 0 are left out. The router's bias of the logits counts; its correction of the scores does not.
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
