"""Dense fine-tunes of one base model as the sub-models of a merge: each is an MoE whose only expert is its MLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor

import torch
from torch import Tensor

from moedisco_ray.models import Checkpoint, ModelMap, OneExpert, Role, Stored
from moedisco_ray.stages.merge.build import OpenModel


class Finetune(OpenModel):
    """A fine-tune as a sub-model with one expert, in the dtype of the merged model. Tensors are read on access.

    Args:
        model: The fine-tune as an MoE with one expert.
        backbone: Where the backbone comes from: the fine-tune itself, or the base model.
        routers: Canonical tensors of a merged model. The sub-model gets row `number` of its routers.
        number: Position of the fine-tune among those to merge.
        model_map: Names of the tensors.
        dtype: Dtype of all tensors.
    """

    def __init__(
        self,
        model: Checkpoint | OneExpert,
        backbone: Checkpoint | OneExpert,
        *,
        routers: Mapping[str, Tensor],
        number: int,
        model_map: ModelMap,
        dtype: torch.dtype,
    ) -> None:
        self.model_map = model_map
        self._model, self._backbone, self._routers, self._number, self._dtype = model, backbone, routers, number, dtype
        self._roles = {key: model_map.classify(key) for key in sorted(model, key=model_map.sort_key)}

    def __getitem__(self, key: str) -> Tensor:
        role, axis = self._roles[key].role, self._roles[key].expert_axis
        if role is Role.ROUTER and axis is not None:
            return self._routers[key].narrow(axis, self._number, 1).to(self._dtype)
        return (self._model if role is Role.EXPERT else self._backbone)[key].to(self._dtype)

    def __contains__(self, key: object) -> bool:
        return key in self._roles  # the mapping's own method would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def layout(self) -> dict[str, Stored]:
        """Shape and dtype of every tensor, in order."""
        return {key: Stored(self._model.shape(key), self._dtype) for key in self}

    def read_ahead(self, keys: Iterable[str], reader: Executor) -> None:
        """Start reading tensors of the fine-tune into the page cache; see `Checkpoint.read_ahead`."""
        self._model.read_ahead(keys, reader)
