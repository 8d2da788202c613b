"""Document vectors from the seed model: the mean of its last hidden states, centred and scaled to unit length.

Shapes: N documents, B documents of a batch, L tokens, D dimensions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from moedisco_ray.core.limits import VECTOR_TOKENS
from moedisco_ray.models.layer_stream import final_states, grouped
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.vectors.base import FitInputs, Vectoriser, read_settings, write_settings
from moedisco_ray.stages.scoring import default_dtype

_MODEL_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json")


class HiddenState(Vectoriser):
    """Mean last hidden state over the first tokens of a document; zero for a document without tokens.

    Unless the model is small, one decoder layer is in memory at a time. On a GPU the model runs in bf16; means are
    always fp32.

    On a CPU each document is computed separately, so its vector does not depend on other documents, to the last bit. On
    a GPU, documents of similar length share a batch. Padding on the right does not affect a causal model's earlier
    tokens, so only rounding differs.

    Args:
        model_dir: Directory of a Hugging Face causal language model.
        max_tokens: Number of tokens to read from a document's beginning.
        device: Device of the model.
        batch_tokens: Maximum tokens per batch on a GPU.
    """

    kind = "hidden_state"

    def __init__(
        self, model_dir: Path, max_tokens: int, device: str = "cpu", batch_tokens: int = VECTOR_TOKENS
    ) -> None:
        self._model_dir, self._max_tokens = model_dir, max_tokens
        self._batch_tokens = 0 if torch.device(device).type == "cpu" else batch_tokens
        self._model = open_streamed(model_dir, dtype=default_dtype(device), device=device)
        self._device = device

    @classmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """Open the seed model. The vectoriser has no centre yet; `centre` sets it."""
        return cls(inputs.model_dir, inputs.max_tokens)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:  # noqa: ARG002 - one signature for all
        """Mean hidden states before centring, float32 [N, D]."""
        x_ND = np.zeros((len(tokens), self._model.config.hidden_size), dtype=np.float32)
        lengths_N = np.minimum([len(document) for document in tokens], self._max_tokens).astype(np.int64)
        batches = _batches(lengths_N, self._batch_tokens)
        for group in grouped(batches, lambda rows: len(rows) * int(lengths_N[rows].max()), self._model):
            filled = [self._fill(tokens, rows, lengths_N[rows]) for rows in group]
            states = final_states(
                self._model, (tokens_BL for tokens_BL, _ in filled), masks=[mask_BL.long() for _, mask_BL in filled]
            )
            for rows, (_, mask_BL), hidden_BLD in zip(group, filled, states, strict=True):
                x_ND[rows] = _mean(hidden_BLD.float(), mask_BL).cpu().numpy()
        return x_ND

    def _fill(self, tokens: Sequence[Array], rows: Array, lengths_B: Array) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] of a batch, padded on the right, and the mask [B, L] of positions that are not padding."""
        longest = int(lengths_B.max())
        tokens_BL = np.zeros((len(rows), longest), dtype=np.int64)
        for b, i in enumerate(rows):
            tokens_BL[b, : lengths_B[b]] = tokens[i][: lengths_B[b]]
        mask_BL = torch.arange(longest, device=self._device) < torch.from_numpy(lengths_B).to(self._device)[:, None]
        return torch.from_numpy(tokens_BL).to(self._device), mask_BL

    def centre(self, sample_ND: Array) -> None:
        """Set the centre to the mean of the embedded sample."""
        self.centre_D = sample_ND.mean(axis=0, dtype=np.float64).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Write the centre, and the model's files as hard links if the file system supports them."""
        target = directory / "model"
        target.mkdir(exist_ok=True)
        for path in sorted(path for pattern in _MODEL_FILES for path in self._model_dir.glob(pattern)):
            _link_or_copy(path, target / path.name)
        if self.centre_D is not None:
            save_file({"centre": self.centre_D}, directory / "vectoriser.safetensors")
        write_settings(directory, self.kind, max_tokens=self._max_tokens)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Load a saved vectoriser."""
        loaded = cls(directory / "model", read_settings(directory)["max_tokens"], device)
        if (directory / "vectoriser.safetensors").exists():
            loaded.centre_D = load_file(directory / "vectoriser.safetensors")["centre"]
        return loaded


def _mean(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    weights_BL = mask_BL.to(hidden_BLD.dtype) / mask_BL.sum(dim=1, keepdim=True)
    return torch.einsum("bld,bl->bd", hidden_BLD, weights_BL)


def _batches(lengths_N: Array, batch_tokens: int) -> Iterator[Array]:
    """Group rows of non-empty documents by length into batches of at most `batch_tokens` padded tokens, or one row."""
    order = np.argsort(lengths_N, kind="stable")
    order = order[lengths_N[order] > 0]
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths_N[order[stop]] <= batch_tokens:
            stop += 1
        yield order[start:stop]
        start = stop


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # the target is on another file system, or its file system has no hard links
        shutil.copyfile(source, target)
