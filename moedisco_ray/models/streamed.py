"""transformers models of any size: each part of a model loads its weights from memory-mapped files when it runs.

The parts are the embedding, the decoder layers, the norm and the head. The model can be called like any other model; each forward
pass loads all weights once, one layer at a time. `layer_stream` runs many batches through a layer before it loads the next one.

On the CPU the results are bit for bit those of the same model in memory: the same modules run on the same inputs.

Shapes: B sequences, L positions, T tokens, K selected experts, S tokens of one expert, D hidden, F expert hidden.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import PARTS, Part
from moedisco_ray.models.checkpoint import Checkpoint
from moedisco_ray.models.checks import open_complete
from moedisco_ray.models.hf import canonical_shapes, moe_blocks, skeleton, with_parameters_in
from moedisco_ray.models.layout import ModelMap
from moedisco_ray.models.speed import runnable

RESIDENT_BYTES = 2**30
"""Maximum size of a model that stays in a CPU's memory after its first use (bytes)."""
_RESIDENT_SHARE = 0.4
"""Maximum share of a GPU's memory for a model that stays loaded: the rest is for activations."""
EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding's tensor, the same in every family."""
_HEAD = "lm_head.weight"


def streamed_model(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | PretrainedConfig, *, dtype: torch.dtype, device: str = "cpu",
    resident: bool | None = None, few_tokens: bool = False,
) -> PreTrainedModel:
    """Build a model whose parts load their weights when they run.

    Args:
        tensors: Canonical tensors, read on access. A layer's tensors may be added to the mapping as late as just before it runs.
        config: Configuration of the model, or the values of its `config.json`.
        dtype: Dtype of the weights in memory.
        device: Device that the model runs on.
        resident: Whether a part's weights stay loaded after it has run. By default they stay loaded if the whole model is small: at
            most `RESIDENT_BYTES` on a CPU, or 40 % of the memory of a GPU.
        few_tokens: Whether forward passes have few tokens, as in generation. If the weights do not stay loaded, each pass then
            reads only the experts that its tokens select.

    Raises:
        ConfigError: transformers cannot build the model.
    """
    model = with_parameters_in(skeleton(config), dtype)
    base: Any = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)
    reader = ThreadPoolExecutor(1, "read-ahead")
    weights = _Weights(tensors, ModelMap(str(model.config.model_type)), device, dtype, reader)
    if resident is None:
        size = sum(math.prod(shape) for shape in canonical_shapes(model.config).values()) * dtype.itemsize
        resident = size <= _resident_bytes(device)
    base.embed_tokens = StoredEmbedding(weights)
    if few_tokens and not resident and not weights.names.family.stacks:
        for index, block in moe_blocks(model).items():
            block.experts = _SelectedExperts(block.get_submodule("experts"), index, weights)
    parts = [_LoadedPart(layer, f"model.layers.{index}.", weights, keep=resident) for index, layer in enumerate(base.layers)]
    parts.append(_LoadedPart(base.norm, "model.norm.", weights, keep=True))
    parts.append(_LoadedPart(model.get_output_embeddings(), "lm_head.", weights, keep=resident))
    # A part, its module and its hooks refer to each other, and the garbage collector might come after the next model is loaded.
    weakref.finalize(model, _drop, parts, reader).atexit = False
    return runnable(model).eval()


def open_streamed(directory: Path, *, dtype: torch.dtype, device: str = "cpu", few_tokens: bool = False) -> PreTrainedModel:
    """Open a model directory as a model whose parts load their weights when they run; see `streamed_model`.

    Args:
        directory: A Hugging Face directory of a supported family.
        dtype: Dtype of the weights in memory.
        device: Device that the model runs on.
        few_tokens: As in `streamed_model`.

    Raises:
        CheckpointError: The directory cannot be read, or its tensors are not those of its `config.json`.
    """
    stored, config = open_complete(directory)
    return streamed_model(stored, config, dtype=dtype, device=device, few_tokens=few_tokens)


def device_of_model(model: PreTrainedModel) -> torch.device:
    """The device that a model runs on. `model.device` may differ: it is the device of a parameter, which may not be loaded."""
    base: Any = model.base_model
    device: torch.device = base.rotary_emb.inv_freq.device
    return device


@contextlib.contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """Keep the weights of a part of a streamed model loaded until the block ends; does nothing for a model in memory."""
    part: _LoadedPart | None = getattr(module, "streamed_part", None)
    if part is None or part.is_loaded:
        yield module
        return
    part.load()
    try:
        yield module
    finally:
        part.free()


def stays(module: nn.Module) -> bool:
    """Whether a part of a model keeps its weights in memory after it has run."""
    part: _LoadedPart | None = getattr(module, "streamed_part", None)
    return part is None or part.keep


class _Weights:
    """Reads the weights of modules from canonical tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], names: ModelMap, device: str, dtype: torch.dtype, reader: Executor) -> None:
        self._tensors, self.names, self._reader = tensors, names, reader
        self.device, self.dtype = device, dtype

    def stored(self, key: str) -> Tensor:
        return self._tensors[EMBEDDING if key == _HEAD and key not in self._tensors else key]

    def read_ahead(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Read the model's tensors with these names and shapes into the page cache, if they are stored in files."""
        if isinstance(self._tensors, Checkpoint):
            stored = (name for key, shape in shapes.items() for name in self.names.stored_tensors(key, shape))
            self._tensors.read_ahead((name for name in stored if name in self._tensors), self._reader)

    def read(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Read a tensor of the model; a stack of experts is filled from one stored tensor per expert."""
        target = torch.empty(shape, dtype=dtype, device=self.device)
        for name, place in self.names.stored_tensors(key, shape).items():
            piece, source = target[place.index(shape)], self.stored(name)
            if piece.shape != source.shape:
                raise CheckpointError("tensor", name, f"has shape {list(source.shape)}, but config.json says {list(piece.shape)}")
            piece.copy_(source)
        return target


class _LoadedPart:
    """Loads the weights of one module before it runs, and frees them afterwards unless `keep` is set."""

    def __init__(self, module: nn.Module, prefix: str, weights: _Weights, *, keep: bool) -> None:
        self._module, self._prefix, self._weights, self.keep = module, prefix, weights, keep
        self._empty: dict[str, Tensor] = {}     # the module's tensors on the meta device, while its weights are loaded
        self._passing = False       # whether the weights are loaded for one forward pass only
        self.is_loaded = False
        module.streamed_part = self     # type: ignore[assignment]  # found again by `loaded`
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def load(self) -> None:
        empty = self._empty = self._module.state_dict()
        self._weights.read_ahead({self._prefix + name: tuple(tensor.shape) for name, tensor in empty.items()})
        state = {
            name: self._weights.read(self._prefix + name, tuple(tensor.shape), tensor.dtype) for name, tensor in empty.items()}
        self._module.load_state_dict(state, assign=True)
        self.is_loaded = True

    def free(self) -> None:
        if not self.keep:
            self.drop()

    def drop(self) -> None:
        """Free the weights even if `keep` is set."""
        self._module.load_state_dict(self._empty, assign=True)
        self.is_loaded = False

    def _before(self, _module: nn.Module, _inputs: Any) -> None:
        self._passing = not self.is_loaded
        if self._passing:
            self.load()

    def _after(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._passing:
            self.free()


def _drop(parts: Sequence[_LoadedPart], reader: Executor) -> None:
    reader.shutdown(wait=False, cancel_futures=True)    # the collector may call this in the thread itself
    for part in parts:
        if part.is_loaded:
            part.drop()


class StoredEmbedding(nn.Module):
    """Looks up tokens in the stored embedding, and loads only the rows of these tokens."""

    def __init__(self, weights: _Weights) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embeddings [B, L, D] of tokens, on the model's device."""
        rows = functional.embedding(tokens_BL.cpu(), self._weights.stored(EMBEDDING))
        return rows.to(self._weights.device, self._weights.dtype)


class _SelectedExperts(nn.Module):
    """The experts of a layer, each read from its stored tensors when a token selects it."""

    def __init__(self, experts: nn.Module, layer: int, weights: _Weights) -> None:
        super().__init__()
        self._act: Any = experts.act_fn
        self._layer, self._weights = layer, weights

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert in sorted(set(expert_TK.flatten().tolist())):
            token_S, k_S = (expert_TK == expert).nonzero(as_tuple=True)
            w_gate_FD, w_up_FD, w_down_DF = (self._read(expert, part) for part in PARTS)
            x_SD = x_TD[token_S]
            hidden_SF = self._act(functional.linear(x_SD, w_gate_FD)) * functional.linear(x_SD, w_up_FD)
            y_SD = functional.linear(hidden_SF, w_down_DF) * weight_TK[token_S, k_S, None]
            y_TD.index_add_(0, token_S, y_SD.to(y_TD.dtype))
        return y_TD

    def _read(self, expert: int, part: Part) -> Tensor:
        key = self._weights.names.expert_key(self._layer, expert, part)
        return self._weights.stored(key).to(self._weights.device, self._weights.dtype)


def _resident_bytes(device: str) -> float:
    if torch.device(device).type != "cuda":
        return RESIDENT_BYTES
    return _RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory
