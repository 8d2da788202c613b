"""Run a model of any size: its decoder layers are loaded one at a time, from mapped files, and freed after use.

`streamed_model` builds a transformers model without weights. Its parts (embedding, decoder layers, norm, head) load their weights
when they run. So it can be called like any other model, one forward pass per load of all weights. `final_states` runs many batches
through each layer before it loads the next one, which reads the weights once for all of them.

On the CPU the results are the same bits as those of the same model in memory: the same modules run on the same inputs.

Shapes: B sequences, L positions, D hidden.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.read_roots import check_folder
from moedisco_ray.models.checkpoint import open_checkpoint
from moedisco_ray.models.checks import check_complete
from moedisco_ray.models.hf import canonical_shapes, skeleton
from moedisco_ray.models.layout import ModelMap

RESIDENT_BYTES = 2**30
"""Size up to which a model stays in a CPU's memory after its first use (bytes)."""
_RESIDENT_SHARE = 0.4
"""Largest share of a GPU's memory for a model that stays there: the rest is for its activations."""
_CPU_STATES, _GPU_STATES = 2**29, 2**32
"""Maximum size of the hidden states that pass through the layers together (bytes). Larger groups load the weights less often."""
EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding, for every family."""
_HEAD = "lm_head.weight"

T = TypeVar("T")


class Step(Protocol):
    """A decoder layer as a function."""

    def __call__(self, hidden_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """The layer's output for hidden states, with an attention mask; None: every position is real."""


def streamed_model(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | PretrainedConfig, *, dtype: torch.dtype, device: str = "cpu",
    resident: bool | None = None,
) -> PreTrainedModel:
    """A model whose parts read their weights when they run.

    Args:
        tensors: Canonical tensors, read on access: a checkpoint, or a mapping that gets each layer's tensors before the layer runs.
        config: The configuration, or the values of its `config.json`.
        dtype: Dtype of the weights in memory.
        device: Device that the model runs on.
        resident: Whether parts stay loaded; None: if the model takes at most `RESIDENT_BYTES`, or 40 % of a GPU's memory.

    Raises:
        ConfigError: transformers cannot build the model.
    """
    model = skeleton(config).to(dtype)
    base: Any = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)
    weights = _Weights(tensors, ModelMap(str(model.config.model_type)), device, dtype)
    if resident is None:
        size = sum(math.prod(shape) for shape in canonical_shapes(model.config).values()) * dtype.itemsize
        resident = size <= _resident_bytes(device)
    base.embed_tokens = StoredEmbedding(weights)
    for index, layer in enumerate(base.layers):
        _Part(layer, f"model.layers.{index}.", weights, keep=resident)
    _Part(base.norm, "model.norm.", weights, keep=True)
    _Part(model.get_output_embeddings(), "lm_head.", weights, keep=resident)
    return model.eval()


def open_streamed(directory: Path, *, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The model in a directory, with parts that read their weights when they run; see `streamed_model`.

    Args:
        directory: A Hugging Face directory of a supported family.
        dtype: Dtype of the weights in memory.
        device: Device that the model runs on.

    Raises:
        CheckpointError: The directory cannot be read, or its tensors are not those of its `config.json`.
    """
    stored = open_checkpoint(directory)
    try:
        check_folder(directory)     # transformers opens the file itself, not by `opened`
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        check_complete(stored, canonical_shapes(config))
    except (OSError, ValueError) as error:
        raise CheckpointError("checkpoint", str(directory), f"cannot be loaded ({error})") from error
    except CheckpointError as error:
        raise CheckpointError("checkpoint", str(directory), f"tensor {error.value} {error.remedy}") from error
    return streamed_model(stored, config, dtype=dtype, device=device)


def device_of_model(model: PreTrainedModel) -> torch.device:
    """The device that a model runs on; `model.device` is that of a parameter, which may not be loaded."""
    base: Any = model.base_model
    device: torch.device = base.rotary_emb.inv_freq.device
    return device


@contextlib.contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """Hold the weights of a part of a model until the block ends; without effect on a model in memory."""
    part: _Part | None = getattr(module, "streamed_part", None)
    if part is None or part.is_loaded:
        yield module
        return
    part.load()
    try:
        yield module
    finally:
        part.free()


def final_states(
    model: PreTrainedModel, inputs: Iterable[Tensor], *, masks: Sequence[Tensor | None] | None = None,
    before: Callable[[int], None] | None = None, after: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """The last hidden state of every batch.

    If the model is streamed and does not stay in memory, all batches pass through a layer before the next layer is loaded; the
    hidden states of all batches are in memory then, see `grouped`.

    Args:
        model: A model, streamed or in memory.
        inputs: Token ids [B, L] of each batch, on the model's device.
        masks: Attention mask [B, L] of each batch; None: every position is real.
        before: Receives the number of a batch before layers run on it.
        after: Receives the number of a batch and how many layers have run on it since the last call.

    Yields:
        Hidden states [B, L, D] of each batch in turn.
    """
    base: Any = model.base_model
    run = _Observed(before, after)
    if all(_stays(layer) for layer in base.layers):
        for number, tokens_BL in enumerate(inputs):
            with run.on(number, len(base.layers)):
                hidden_BLD = base(tokens_BL, attention_mask=_mask(masks, number), use_cache=False).last_hidden_state
            yield hidden_BLD
        return
    states = [base.embed_tokens(tokens_BL) for tokens_BL in inputs]
    for index, layer in enumerate(base.layers):
        step = layer_step(model, index)
        with loaded(layer):
            for number, hidden_BLD in enumerate(states):
                with run.on(number, 1):
                    states[number] = step(hidden_BLD, _mask(masks, number))
    states.reverse()
    while states:
        yield base.norm(states.pop())


def layer_step(model: PreTrainedModel, index: int) -> Step:
    """One decoder layer as a function of hidden states.

    transformers' own forward pass of the whole model calls it, with all other layers left out, so attention mask and position
    embeddings are those that transformers computes for the family.
    """
    base: Any = model.base_model
    alone = copy.copy(base)
    alone._modules = dict(base._modules)    # noqa: SLF001 - `copy` shares the dictionary of the model itself
    alone.norm = nn.Identity()
    alone.layers = nn.ModuleList([layer if i == index else _LeftOut() for i, layer in enumerate(base.layers)])

    def step(hidden_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        found: Tensor = alone(inputs_embeds=hidden_BLD, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return found

    return step


def grouped(items: Iterable[T], positions: Callable[[T], int], model: PreTrainedModel) -> Iterator[list[T]]:
    """Cut batches into groups whose hidden states fit in memory together; a group is at least one batch.

    Args:
        items: The batches.
        positions: Returns the number of positions of a batch, padding included.
        model: The model that they pass through.
    """
    limit = _GPU_STATES if device_of_model(model).type == "cuda" else _CPU_STATES
    each = int(model.config.hidden_size) * model.dtype.itemsize
    group: list[T] = []
    size = 0
    for item in items:
        added = positions(item) * each
        if group and size + added > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += added
    if group:
        yield group


@dataclasses.dataclass(frozen=True)
class _Observed:
    """Calls the observers of `final_states` around a run of layers."""

    before: Callable[[int], None] | None
    after: Callable[[int, int], None] | None

    @contextlib.contextmanager
    def on(self, number: int, layers: int) -> Iterator[None]:
        if self.before is not None:
            self.before(number)
        yield
        if self.after is not None:
            self.after(number, layers)


def _mask(masks: Sequence[Tensor | None] | None, number: int) -> Tensor | None:
    return None if masks is None else masks[number]


def _stays(module: nn.Module) -> bool:
    """Whether the weights of a part of a model stay in memory."""
    part: _Part | None = getattr(module, "streamed_part", None)
    return part is None or part.keep


class _Weights:
    """Reads the weights of modules from canonical tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], names: ModelMap, device: str, dtype: torch.dtype) -> None:
        self._tensors, self._names = tensors, names
        self.device, self.dtype = device, dtype

    def stored(self, key: str) -> Tensor:
        return self._tensors[EMBEDDING if key == _HEAD and key not in self._tensors else key]

    def read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the model in memory; a stack of experts is filled from one tensor per expert."""
        target = torch.empty(shape, dtype=self.dtype, device=self.device)
        for name, place in self._names.stored_tensors(key, shape).items():
            piece, source = target[place.index(shape)], self.stored(name)
            if piece.shape != source.shape:
                raise CheckpointError("tensor", name, f"has shape {list(source.shape)}, but config.json says {list(piece.shape)}")
            piece.copy_(source)
        return target


class _Part:
    """Loads the weights of one module before it runs, and frees them afterwards unless `keep` is set."""

    def __init__(self, module: nn.Module, prefix: str, weights: _Weights, *, keep: bool) -> None:
        self._module, self._prefix, self._weights, self.keep = module, prefix, weights, keep
        self._passing = False       # whether the weights are loaded for one forward pass only
        self.is_loaded = False
        module.streamed_part = self     # type: ignore[assignment]  # found again by `loaded`
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def load(self) -> None:
        state = {name: self._weights.read(self._prefix + name, tuple(p.shape)) for name, p in self._module.named_parameters()}
        self._module.load_state_dict(state, assign=True)
        self.is_loaded = True

    def free(self) -> None:
        if not self.keep:
            self._module.to("meta")
            self.is_loaded = False

    def _before(self, _module: nn.Module, _inputs: Any) -> None:
        self._passing = not self.is_loaded
        if self._passing:
            self.load()

    def _after(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._passing:
            self.free()


class StoredEmbedding(nn.Module):
    """Looks tokens up in the stored embedding; only the rows of these tokens are loaded."""

    def __init__(self, weights: _Weights) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embeddings [B, L, D] of tokens, on the model's device."""
        rows = functional.embedding(tokens_BL.cpu(), self._weights.stored(EMBEDDING))
        return rows.to(self._weights.device, self._weights.dtype)


class _LeftOut(nn.Module):
    """A decoder layer that returns its input."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def _resident_bytes(device: str) -> float:
    if torch.device(device).type != "cuda":
        return RESIDENT_BYTES
    return _RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory
