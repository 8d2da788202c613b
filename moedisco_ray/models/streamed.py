"""transformers models of any size: each part of a model loads its weights from memory-mapped files when it runs.

The parts are the embedding, the decoder layers, the norm and the head. The model can be called like any other model;
each forward pass loads all weights once, one layer at a time. `layer_stream` runs many batches through a layer before
it loads the next one.

On the CPU the results are bit for bit those of the same model in memory: the same modules run on the same inputs.

Shapes: B sequences, L positions, D hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import PARTS
from moedisco_ray.core.limits import RESIDENT_BYTES, RESIDENT_SHARE
from moedisco_ray.models.checkpoint import Checkpoint
from moedisco_ray.models.checks import open_complete
from moedisco_ray.models.hf import canonical_shapes, moe_blocks, skeleton, with_parameters_in
from moedisco_ray.models.layout import ModelMap
from moedisco_ray.models.mapped_pages import map_pages, read_soon
from moedisco_ray.models.selected_experts import Load, SelectedExperts
from moedisco_ray.models.speed import runnable

EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding's tensor, the same in every family."""
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Offload:
    """Where experts are while no token selects them.

    Attributes:
        place: `cpu` is the memory of this machine, `disk` the mapped files of the model.
        resident: Number of experts per layer that stay on the device, those used last; None: twice the number per
            token.
    """

    place: Literal["cpu", "disk"]
    resident: int | None = None


def streamed_model(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    resident: bool | None = None,
    few_tokens: bool = False,
    offload: Offload | None = None,
) -> PreTrainedModel:
    """Build a model whose parts load their weights when they run.

    Args:
        tensors: Canonical tensors, read on access. A layer's tensors may be added to the mapping as late as just before
            it runs.
        config: Configuration of the model, or the values of its `config.json`.
        dtype: Dtype of the weights in memory.
        device: Device that the model runs on.
        resident: Whether a part's weights stay loaded after it has run. By default they stay loaded if the whole model
            is small: at most `RESIDENT_BYTES` on a CPU, or 40 % of the memory of a GPU.
        few_tokens: Whether forward passes have few tokens, as in generation. If the weights do not stay loaded, each
            pass then reads only the experts that its tokens select.
        offload: Where the experts are until tokens select them. By default they are loaded with their layer.

    Raises:
        CheckpointError: A tensor has another shape than the configuration says.
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
    if offload is None and few_tokens and not resident:
        offload = Offload("disk", resident=0)
    if offload is not None:
        _offload_experts(model, weights, offload)
    parts = [
        _LoadedPart(layer, f"model.layers.{index}.", weights, keep=resident) for index, layer in enumerate(base.layers)
    ]
    parts.append(_LoadedPart(base.norm, "model.norm.", weights, keep=True))
    parts.append(_LoadedPart(model.get_output_embeddings(), "lm_head.", weights, keep=resident))
    # A part, its module and its hooks refer to each other, and the garbage collector might come after the next model is
    # loaded.
    weakref.finalize(model, _drop, parts, reader).atexit = False
    return runnable(model).eval()


def open_streamed(
    directory: Path, *, dtype: torch.dtype, device: str = "cpu", resident: bool | None = None, few_tokens: bool = False
) -> PreTrainedModel:
    """Open a model directory as a model whose parts load their weights when they run; see `streamed_model`.

    Args:
        directory: A Hugging Face directory of a supported family.
        dtype: Dtype of the weights in memory.
        device: Device that the model runs on.
        resident: As in `streamed_model`.
        few_tokens: As in `streamed_model`.

    Raises:
        CheckpointError: The directory cannot be read, or its tensors are not those of its `config.json`.
    """
    stored, config = open_complete(directory)
    return streamed_model(stored, config, dtype=dtype, device=device, resident=resident, few_tokens=few_tokens)


def open_offloaded(directory: Path, offload: Offload, *, device: str = "cpu") -> PreTrainedModel:
    """Open a model directory with everything but the experts loaded on the device; see `Offload`.

    Args:
        directory: A Hugging Face directory of a supported family.
        offload: Where the experts are.
        device: Device that the model runs on.

    Raises:
        CheckpointError: The directory cannot be read, or its tensors are not those of its `config.json`.
    """
    stored, config = open_complete(directory)
    dtype = config.dtype or stored.dtype(EMBEDDING) or torch.float32
    model = streamed_model(stored, config, dtype=dtype, device=device, resident=True, offload=offload)
    for module in model.modules():
        part: _LoadedPart | None = getattr(module, "streamed_part", None)
        if part is not None:
            part.load()
    with contextlib.suppress(OSError):  # there is none: transformers derives it from the configuration
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


def device_of_model(model: PreTrainedModel) -> torch.device:
    """The device that a model runs on.

    `model.device` may differ: it is the device of a parameter, which may not be loaded.
    """
    base: Any = model.base_model
    device: torch.device = base.rotary_emb.inv_freq.device
    return device


@contextlib.contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """Keep the weights of a part of a streamed model loaded until the block ends; no effect on a model in memory."""
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

    def __init__(
        self, tensors: Mapping[str, Tensor], names: ModelMap, device: str, dtype: torch.dtype, reader: Executor
    ) -> None:
        self._tensors, self.names, self._reader = tensors, names, reader
        self.device, self.dtype = device, dtype

    def stored(self, key: str) -> Tensor:
        return self._tensors[EMBEDDING if key == _HEAD and key not in self._tensors else key]

    def read_ahead(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Read the model's tensors with these names and shapes into the page cache, if they are stored in files."""
        if isinstance(self._tensors, Checkpoint):
            stored = (name for key, shape in shapes.items() for name in self.names.stored_tensors(key, shape))
            self._tensors.read_ahead((name for name in stored if name in self._tensors), self._reader)

    def read(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, device: str | None = None) -> Tensor:
        """Read a tensor of the model; a stack of experts is filled from one stored tensor per expert."""
        target = torch.empty(shape, dtype=dtype, device=device or self.device)
        for name, place in self.names.stored_tensors(key, shape).items():
            _copy(name, self.stored(name), target[place.index(shape)])
        return target

    def expert_loader(self, experts: nn.Module, layer: int, *, in_memory: bool) -> Load:
        """A function that loads a layer's experts one at a time, from a copy in memory or from the stored tensors."""
        if not in_memory:
            return functools.partial(self._read_expert, layer)
        shapes = {name: tuple(stack.shape) for name, stack in experts.named_parameters()}
        prefix = f"model.layers.{layer}.mlp.experts."
        self.read_ahead({prefix + name: shape for name, shape in shapes.items()})
        held = {name: self.read(prefix + name, shape, self.dtype, "cpu") for name, shape in shapes.items()}
        if torch.device(self.device).type == "cuda":  # a GPU reads pinned memory several times as fast
            held = {name: stack.pin_memory() for name, stack in held.items()}
        return functools.partial(_copy_expert, held)

    def _read_expert(self, layer: int, expert: int, targets: Mapping[str, Tensor]) -> None:
        if self.names.family.stacks:
            places = {self.names.block_key(layer, f"experts.{name}"): target for name, target in targets.items()}
            sources = {key: self._of_stack(key, expert) for key in places}
        else:
            parts = (*targets["gate_up_proj"].chunk(2), targets["down_proj"])
            places = {
                self.names.expert_key(layer, expert, part): target for part, target in zip(PARTS, parts, strict=True)
            }
            sources = {key: self.stored(key) for key in places}
        if isinstance(self._tensors, Checkpoint):
            read_soon(sources.values())
        for key, target in places.items():
            _copy(key, sources[key], target)

    def _of_stack(self, key: str, expert: int) -> Tensor:
        if isinstance(self._tensors, Checkpoint):
            return self._tensors.of_stack(key, expert)
        return self._tensors[key][expert]


def _copy(name: str, source: Tensor, target: Tensor) -> None:
    if target.shape != source.shape:
        raise CheckpointError(
            "tensor", name, f"has shape {list(source.shape)}, but config.json says {list(target.shape)}"
        )
    target.copy_(map_pages(source))


def _copy_expert(held: Mapping[str, Tensor], expert: int, targets: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(held[name][expert], non_blocking=True)  # from pinned memory; later kernels wait for it


class _LoadedPart:
    """Loads the weights of one module before it runs, and frees them afterwards unless `keep` is set."""

    def __init__(self, module: nn.Module, prefix: str, weights: _Weights, *, keep: bool) -> None:
        self._module, self._prefix, self._weights, self.keep = module, prefix, weights, keep
        self._empty: dict[str, Tensor] = {}  # the module's tensors on the meta device, while its weights are loaded
        self._passing = False  # whether the weights are loaded for one forward pass only
        self.is_loaded = False
        module.streamed_part = self  # type: ignore[assignment]  # found again by `loaded`
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def load(self) -> None:
        empty = self._empty = self._module.state_dict()
        self._weights.read_ahead({self._prefix + name: tuple(tensor.shape) for name, tensor in empty.items()})
        state = {
            name: self._weights.read(self._prefix + name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in empty.items()
        }
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


def _offload_experts(model: PreTrainedModel, weights: _Weights, offload: Offload) -> None:
    top_k = int(getattr(model.config, weights.names.family.router.top_k_field))
    resident = 2 * top_k if offload.resident is None else offload.resident
    for index, block in moe_blocks(model).items():
        experts = block.get_submodule("experts")
        load = weights.expert_loader(experts, index, in_memory=offload.place == "cpu")
        block.experts = SelectedExperts(experts, load, weights.device, resident)


def _drop(parts: Sequence[_LoadedPart], reader: Executor) -> None:
    reader.shutdown(wait=False, cancel_futures=True)  # the collector may call this in the thread itself
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


def _resident_bytes(device: str) -> float:
    if torch.device(device).type != "cuda":
        return RESIDENT_BYTES
    return RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory
