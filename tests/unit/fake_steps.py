"""Training steps on FakeTensors: every operation with its true shapes and dtypes, but no memory and no arithmetic."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from docs.plans import CHECKPOINTS, OTHERS
from moedisco_ray.core.config import Architecture, FamilyName
from moedisco_ray.models import attention, hf_config, speed
from moedisco_ray.training import muon
from moedisco_ray.training import optimizer as optimizer_module

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

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


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
        yield
        self._host = False

    def resized(self, storage: torch.UntypedStorage) -> None:
        if not self._host:
            super().resized(storage)

    def is_on_host(self, tensor: Tensor) -> bool:
        return not self._sizes.get(tensor.untyped_storage()._cdata, 1)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function in (aten.index.Tensor, aten.index_put_.default) and getattr(args[1][0], "dtype", None) == torch.bool
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
    usual = ALL_EXPERTS_FUNCTIONS[speed._IMPLEMENTATION]

    def on_gpus(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        group = speed.group_of(self)
        if group is None:
            return speed.grouped_experts(self, x_TD, expert_TK, weight_TK)
        return speed.divided_experts(self, x_TD, expert_TK, weight_TK, group=group, compute=speed.grouped_experts)

    ALL_EXPERTS_FUNCTIONS.register(speed._IMPLEMENTATION, on_gpus)
    yield
    ALL_EXPERTS_FUNCTIONS.register(speed._IMPLEMENTATION, usual)


@contextlib.contextmanager
def path_of_gpus() -> Iterator[None]:
    """Run experts and attention as GPUs do, and let optimizers count their steps without reading a tensor.

    Positions are consecutive, which transformers cannot see in FakeTensors: it would make a mask, and a copy of the keys and values
    for every head.
    """
    with experts_of_gpus(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", _efficient_attention)
        # Whether positions are consecutive, and where documents begin, depends on numbers that FakeTensors do not have.
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
        patch.setattr(attention, "document_bounds", lambda positions_BL: torch.zeros(2 * len(positions_BL), dtype=torch.int32))
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
        query, key, value, None if mask is None else mask.expand(*query.shape[:3], key.shape[2]), compute_log_sumexp=True,
        is_causal=mask is None, scale=settings["scale"])[0]
    return found
