"""Training steps on FakeTensors: every operation with its true shapes and dtypes, but no memory and no arithmetic."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from docs.plans import CHECKPOINTS, LARGER
from moedisco_ray.core.config import Architecture, FamilyName
from moedisco_ray.models import hf_config, speed
from moedisco_ray.training import muon
from moedisco_ray.training import optimizer as optimizer_module

SEQUENCE = 1024
PUBLISHED = CHECKPOINTS | LARGER
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
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._sizes:
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
def path_of_gpus() -> Iterator[None]:
    """Run experts and attention as GPUs do, and let optimizers count their steps without reading a tensor."""
    usual = ALL_EXPERTS_FUNCTIONS[speed._IMPLEMENTATION]

    def on_gpus(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        group = speed.group_of(self)
        if group is None:
            return speed.grouped_experts(self, x_TD, expert_TK, weight_TK)
        return speed.divided_experts(self, x_TD, expert_TK, weight_TK, group=group, compute=speed.grouped_experts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", _efficient_attention)
        for module in (optimizer_module, muon):
            patch.setattr(module, "int", lambda _: 1, raising=False)
        ALL_EXPERTS_FUNCTIONS.register(speed._IMPLEMENTATION, on_gpus)
        yield
        ALL_EXPERTS_FUNCTIONS.register(speed._IMPLEMENTATION, usual)


def fake_model(family: FamilyName, architecture: Architecture, vocabulary: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the meta device, whose tensors have shapes but no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config(family, architecture, vocabulary, SEQUENCE, 0), dtype=dtype)


def _efficient_attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """Attention as GPUs compute it; a CPU stores all scores if values have another size than keys.

    The mask is left out: transformers makes one only because it cannot see that positions of FakeTensors are consecutive.
    """
    if key.shape[-1] == value.shape[-1]:
        return FUSED(query, key, value, **settings)
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, compute_log_sumexp=True, is_causal=True, scale=settings["scale"])[0]
    return found
