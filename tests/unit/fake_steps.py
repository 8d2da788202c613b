"""Training steps on FakeTensors: every operation with its true shapes and dtypes, but no memory and no arithmetic."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from docs.plans import CHECKPOINTS, OTHERS
from moedisco_ray.core.config import Architecture, FamilyName, Lora, Optimizer
from moedisco_ray.models import attention, hf_config, speed
from moedisco_ray.models.attention import BY_DOCUMENT, MASKED
from moedisco_ray.packed_tokens import batch_indices
from moedisco_ray.plan.attention_memory import needs_mask
from moedisco_ray.plan.memory import largest_block
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.training import TrainJob, World, muon
from moedisco_ray.training import optimizer as optimizer_module
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.lora import add_adapters
from moedisco_ray.training.sharding import compute_dtype, configured
from moedisco_ray.training.stepper import ResidentStepper

aten = torch.ops.aten
SEQUENCE = 1024
PUBLISHED = CHECKPOINTS | OTHERS
FUSED = functional.scaled_dot_product_attention


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that exist; of a sharded tensor, this worker's part."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            tensor = each.to_local() if isinstance(each, DTensor) else each
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            if (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = 0
                self.resized(storage)
                weakref.finalize(storage, self._drop, storage._cdata)
        return result

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage's new size: FSDP empties the storage of a gathered weight and fills it again."""
        if storage._cdata in self._sizes:
            self.now += storage.nbytes() - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """Return the peak, and begin another one."""
        peak, self.peak = self.peak, self.now
        return peak

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


MOMENTS = ("last layer", "other layers", "first layer", "step")
"""Parts of a training step: until the backward pass leaves the last layer, until it reaches the first one, until it
ends, the rest.

Within each but the second, a further layer adds the same bytes to the peak, whatever the number of layers.
"""


class Moments:
    """The most bytes in each part of training steps.

    Attributes:
        peaks: Bytes, by `MOMENTS`.
    """

    def __init__(self, live: LiveBytes, step: ResidentStepper) -> None:
        self.peaks = dict.fromkeys(MOMENTS, 0)
        self._live, self._now = live, MOMENTS[0]
        layers = step._model.model.layers
        layers[-1].register_forward_pre_hook(self._enters_last)
        layers[0].register_forward_hook(self._leaves_first)
        step.optimizer.register_step_pre_hook(lambda *_: self._begin("step"))
        step.optimizer.register_step_post_hook(lambda *_: self._begin("last layer"))

    def _begin(self, moment: str) -> None:
        self.peaks[self._now] = max(self.peaks[self._now], self._live.restart())
        self._now = moment

    def _enters_last(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._begin("last layer")  # of another micro-batch
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: self._leaves_last())

    def _leaves_last(self) -> None:
        if self._now == "last layer":  # of two layers, the first one comes next
            self._begin("other layers")

    def _leaves_first(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self._begin("first layer"))


class InferenceBytes(LiveBytes):
    """Bytes that a forward pass holds on its device, without those that `HostCopies` moves to the host.

    Masks select everything, and every number that is read is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self._host = False

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Count nothing of the tensors that are made until the block ends."""
        self._host = True
        try:
            yield
        finally:
            self._host = False

    def resized(self, storage: torch.UntypedStorage) -> None:
        if not self._host:
            super().resized(storage)

    def is_on_host(self, tensor: Tensor) -> bool:
        return not self._sizes.get(tensor.untyped_storage()._cdata, 1)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = (
            function in (aten.index.Tensor, aten.index_put_.default)
            and getattr(args[1][0], "dtype", None) == torch.bool
        )
        # Without training, dropout returns its input; its decomposition for FakeTensors makes a copy.
        if function is aten.dropout.default or (by_mask and function is aten.index_put_.default):
            return args[0]
        if function is aten.is_nonzero.default:
            return True
        if function in (aten.item.default, aten._local_scalar_dense.default):
            return 1.0 if args[0].dtype.is_floating_point else 1
        if function is aten.bincount.default:
            function, args = aten.new_zeros.default, (args[0], args[2:])
        elif by_mask:
            function, args = aten.clone.default, (args[0].flatten(0, args[1][0].dim() - 1),)
        return super().__torch_dispatch__(function, types, args, kwargs)


class HostCopies(TorchFunctionMode):
    """Marks tensors that are copied to the host for `InferenceBytes`, where FakeTensors are on one device."""

    def __init__(self, live: InferenceBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.numpy:
            return np.zeros(args[0].shape, dtype=str(args[0].dtype).removeprefix("torch."))
        if function is Tensor.cpu:
            with self._live.on_host():
                return args[0].clone()
        found = function(*args, **(kwargs or {}))
        return found.clone() if function is Tensor.to and found is args[0] and self._live.is_on_host(found) else found


@contextlib.contextmanager
def watching_storages(live: LiveBytes) -> Iterator[None]:
    """Let `LiveBytes` see the storages that change their size, which is no operation on tensors."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        live.resized(storage)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", watched)
        yield


@contextlib.contextmanager
def experts_of_gpus() -> Iterator[None]:
    """Run experts as GPUs do."""
    usual = ALL_EXPERTS_FUNCTIONS[speed.IMPLEMENTATION]

    def on_gpus(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        group = speed.group_of(self)
        if group is None:
            return speed.grouped_experts(self, x_TD, expert_TK, weight_TK)
        return speed.divided_experts(self, x_TD, expert_TK, weight_TK, group=group, compute=speed.grouped_experts)

    ALL_EXPERTS_FUNCTIONS.register(speed.IMPLEMENTATION, on_gpus)
    try:
        yield
    finally:
        ALL_EXPERTS_FUNCTIONS.register(speed.IMPLEMENTATION, usual)


@contextlib.contextmanager
def path_of_gpus() -> Iterator[None]:
    """Run experts and attention as GPUs do, and let optimizers count their steps without reading a tensor.

    Positions are consecutive, which transformers cannot see in FakeTensors: it would make a mask, and a copy of the
    keys and values for every head.
    """
    with experts_of_gpus(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", _efficient_attention)
        # Whether positions are consecutive, and where documents begin, depends on numbers that FakeTensors do not have.
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
        patch.setattr(
            attention, "document_bounds", lambda positions_BL: torch.zeros(2 * len(positions_BL), dtype=torch.int32)
        )
        for module in (optimizer_module, muon):
            patch.setattr(module, "int", lambda _: 1, raising=False)
        yield


def fake_model(family: FamilyName, architecture: Architecture, vocabulary: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the meta device, whose tensors have shapes but no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config(family, architecture, vocabulary, SEQUENCE, 0), dtype=dtype)


def _efficient_attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """Attention as GPUs compute it; a CPU stores all scores if values have another size than keys."""
    if key.shape[-1] == value.shape[-1]:
        return FUSED(query, key, value, **settings)
    mask = settings["attn_mask"]
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query,
        key,
        value,
        None if mask is None else mask.expand(*query.shape[:3], key.shape[2]),
        compute_log_sumexp=True,
        is_causal=mask is None,
        scale=settings["scale"],
    )[0]
    return found


def measured(
    family: FamilyName, architecture: Architecture, vocabulary: int, recipe: Optimizer, lora: Lora | None = None
) -> dict[str, int]:
    """Most bytes in each part of two training steps, by `MOMENTS`; inside `path_of_gpus`."""
    trained = torch.bfloat16 if recipe.state == "bf16" else torch.float32
    model = fake_model(family, architecture, vocabulary, trained if lora is None else compute_dtype(recipe, "cuda"))
    if recipe.within_documents:
        model.set_attn_implementation(MASKED if needs_mask(family, architecture, recipe, gpu=1) else BY_DOCUMENT)
    model = configured(model, recipe)
    if lora is not None:
        add_adapters(model, lora, dtype=trained)
    routes = architecture.num_experts > 1
    job = TrainJob(
        stage="submodels",
        name="fake",
        model=Path(),
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=2,
        sequence_length=SEQUENCE,
        optimizer=recipe,
        checkpoint_every=None,
        load_balance=0.01 * routes,
        z_loss=0.001 * routes,
    )
    with FakeTensorMode(), LiveBytes() as live, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if recipe.within_documents:
            patch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions_BL: positions_BL)
        make_real(model)
        step = ResidentStepper(model, job, World())
        step._checked = True  # the first step's check of the experts reads their gradients
        step.select(deep_step(family, architecture, vocabulary, recipe))
        count = recipe.batch_tokens // SEQUENCE
        size = recipe.micro_batch or count
        tokens = torch.zeros(count, SEQUENCE, dtype=torch.long)
        found = Moments(live, step)
        for _ in range(2):
            step(
                MicroBatch(part, part, job.step_tokens, None, part if recipe.within_documents else None)
                for part in tokens.split(size)
            )
    moments = (tensor for state in step.optimizer.state.values() for key, tensor in state.items() if key != "step")
    # On a CPU, the machine's memory is the device's too.
    elsewhere = sum(tensor.nbytes for tensor in moments) if recipe.offload_moments else 0
    return {moment: peak - elsewhere for moment, peak in found.peaks.items()}


def make_real(model: nn.Module) -> None:
    """Give a model on the meta device tensors of the device at hand; tied weights stay tied."""
    kept: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                kept[id(parameter)] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
                )
            module._parameters[name] = parameter if parameter is None else kept[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def deep_step(family: FamilyName, architecture: Architecture, vocabulary: int, recipe: Optimizer) -> int:
    """A step that trains the larger of embedding and first layer (if blocks train); backward uses all layers."""
    blocks = architecture.num_hidden_layers + 2
    parameters = count_parameters(family, architecture, vocabulary)
    head = parameters.embedding + architecture.hidden_size  # as large as the embedding, and the last norm
    block = 0 if largest_block(parameters, architecture) == head else 1
    return next(period for period in range(blocks) if batch_indices(0, period, 1, blocks)[0] == block) * (
        recipe.block_steps or 1
    )
