"""Calibrate a model of chosen experts: compute router rows of new experts, and refit experts to a smaller model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.contrib.experts.new_rows import new_rows, use_of_new
from moedisco_ray.contrib.experts.refit import add_to_down, down_changes, routed_outputs
from moedisco_ray.models import Checkpoint, moe_blocks, specialise
from moedisco_ray.models.hf import run_router
from moedisco_ray.models.layer_stream import Step
from moedisco_ray.models.streamed import loaded, streamed_model
from moedisco_ray.stages.calibration_text import Batch
from moedisco_ray.stages.merge.calibrate import Layers, RouterSettings, load_matched, total_of
from moedisco_ray.stages.merge.router_init import directions
from moedisco_ray.stages.merge.router_load import Measured


def calibrated_experts(
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    batches: Sequence[Batch],
    *,
    report: list[dict[str, Any]],
    new: Sequence[int] = (),
    whole: Checkpoint | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model of chosen experts, with computed rows of new experts, refitted experts, or both.

    Args:
        tensors: Canonical tensors of the model: the embedding, each layer in turn, norm and head.
        config: `config.json` of the model.
        batches: Calibration data: cluster 0 is the text of all known experts, cluster n that of the n-th new expert.
        report: Receives one entry per MoE layer: `layer`; with new experts `scale`, `use_on_own_text` and
            `use_on_new_texts`; with a refit `error_before` and `error`.
        new: Experts whose rows alone are computed, see `new_rows`.
        whole: A model with more experts or a higher top-k, to whose outputs on the text of cluster 0 the experts are
            refitted (see `refit`). None: no refit.
        device: Device that one layer at a time runs on.
        dtype: Dtype of the layer and its hidden states.

    Yields:
        Every tensor in its stored dtype, sorted by name within a layer.

    Raises:
        CheckpointError: There is no calibration data, or a cluster index is out of range.
    """
    yield from _ChosenLayers(config, batches, new, whole, device=device, dtype=dtype).through(tensors, report)


class _ChosenLayers(Layers):
    def __init__(
        self,
        config: Mapping[str, Any],
        batches: Sequence[Batch],
        new: Sequence[int],
        whole: Checkpoint | None,
        *,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, 1 + len(new), batches, settings=RouterSettings("ridge"), device=device, dtype=dtype)
        self._new = new
        self._larger = (
            None
            if whole is None
            else specialise(streamed_model(whole, whole.config, dtype=dtype, device=device, resident=False))
        )

    def part_fields(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Layers`."""
        return fields  # the known experts were trained in one model

    def entry(self, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """See `Layers`."""
        found = self._set_new_rows(layer, step, tensors) if self._new else {"layer": layer}
        return found if self._larger is None else found | self._refit(self._larger, layer, step, tensors)

    def _refit(self, larger: PreTrainedModel, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        experts, router = (
            self.blocks[layer].get_submodule("experts"),
            partial(run_router, self.blocks[layer], self.kind),
        )
        known = [x_TD[(cluster_T == 0).cpu()] for x_TD, cluster_T in self.labelled_inputs(layer, step)]
        x_TD = torch.cat(known).to(self.device)
        with loaded(larger.get_submodule(f"model.layers.{layer}")):
            block = moe_blocks(larger)[layer]
            target_TD = routed_outputs(block.get_submodule("experts"), partial(run_router, block, self.kind), x_TD)

        def error() -> float:
            """Mean square of the error, as a share of that of the target."""
            error_TD = routed_outputs(experts, router, x_TD).float() - target_TD.float()
            return float(error_TD.square().mean() / target_TD.float().square().mean())

        before = error()
        for expert, change_FD in down_changes(experts, router, x_TD, target_TD).items():
            add_to_down(experts, self.names, layer, expert, change_FD, tensors=tensors)
        return {"error_before": before, "error": error()}

    def _set_new_rows(self, layer: int, step: Step, tensors: dict[str, Tensor]) -> dict[str, Any]:
        key, new, inputs = self.names.router_key(layer), list(self._new), self.row_inputs(layer, step)
        block: Any = self.blocks[layer]
        router = self.routers[layer]
        others = [expert for expert in range(len(tensors[key])) if expert not in new]
        for name in filter(None, (self.kind.bias, self.kind.correction)):  # a new expert has the others' mean
            stored, axis = tensors[self.names.router_key(layer, name)], self.names.family.expert_axis(name)
            mean = stored.index_select(axis, torch.tensor(others)).mean(axis, keepdim=True)
            for expert in new:
                stored.narrow(axis, expert, 1).copy_(mean)
            block.state_dict()[self.kind.in_block(name)].copy_(stored)
        bias_E = torch.zeros(len(tensors[key])) if self.kind.bias is None else getattr(router, self.kind.bias)
        bias_E = bias_E.to(self.device, torch.float64)
        rows_ED, total, top_k = (
            tensors[key].to(self.device, torch.float64),
            total_of(inputs, self.clusters),
            self.whole.top_k,
        )
        unmatched_CD = directions("ridge", total, 0)
        matched_CD = load_matched(unmatched_CD, torch.zeros_like(unmatched_CD), 0.0, inputs, total)
        measured = Measured(self.kind, self.whole, self.part, block, self.clusters)
        correction_E = None if measured.correction_E is None else measured.correction_E[others]
        rows_ED[new], scale = new_rows(
            rows_ED[others],
            bias_E[others],
            matched_CD,
            inputs,
            router=self.kind,
            top_k=top_k,
            correction_E=correction_E,
        )
        self.set_rows(layer, rows_ED.to("cpu", tensors[key].dtype), tensors, both=False)
        own, *of_new = use_of_new(lambda x_TD: measured.selected(x_TD, rows_ED)[0], new, inputs)
        return {"layer": layer, "scale": scale, "use_on_own_text": own, "use_on_new_texts": of_new}
