"""Document vectors of the paper: the mean of a model's token embeddings.

h_x = (1/n) sum_i Embedding(x_i)   (MoE-DisCo, arXiv 2601.06857, section 3), neither centred nor scaled.

Shapes: N documents, D dimensions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy import sparse

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import open_checkpoint
from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.vectors.base import FitInputs, Vectoriser, write_settings

_EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding tensor, the same in all families."""


class MeanToken(Vectoriser):
    """Mean of the rows of an embedding table; a document without tokens is the zero vector.

    Args:
        table_VD: Embedding table, float32.
    """

    kind = "mean_token"

    def __init__(self, table_VD: Array) -> None:
        self._table_VD = table_VD

    @classmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """Use the embedding of the seed model."""
        return cls.of_model(inputs.model_dir)

    @classmethod
    def of_model(cls, directory: Path) -> Self:
        """Read only the embedding layer of a Hugging Face model directory.

        Raises:
            CheckpointError: The directory has no readable embedding tensor.
        """
        model = open_checkpoint(directory)
        if _EMBEDDING not in model:
            raise CheckpointError(str(directory), _EMBEDDING, "is missing; name a complete model")
        return cls(model[_EMBEDDING].to(torch.float32).numpy())

    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:  # noqa: ARG002 - one signature for all
        """Mean token embeddings, float32 [N, D]. A row does not depend on the other documents, to the last bit."""
        lengths_N = np.array([len(document) for document in tokens], dtype=np.int64)
        ids = np.concatenate([np.empty(0, np.int64), *tokens]).astype(np.int64)
        share = np.repeat(1 / np.maximum(lengths_N, 1), lengths_N).astype(np.float32)
        ends = np.concatenate([[0], np.cumsum(lengths_N)])
        mean_NV = sparse.csr_matrix((share, ids, ends), shape=(len(tokens), len(self._table_VD)))
        return np.asarray(mean_NV @ self._table_VD, dtype=np.float32)

    def save(self, directory: Path) -> None:
        """Write the embedding table."""
        save_file({"table": self._table_VD}, directory / "vectoriser.safetensors")
        write_settings(directory, self.kind)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:  # noqa: ARG003 - one signature for all kinds
        """Load a saved vectoriser."""
        return cls(load_file(directory / "vectoriser.safetensors")["table"])
