"""Dense models as Mixture-of-Experts models, with their MLP in the experts' places: what sparse upcycling starts from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from moedisco_ray.config import FamilyName
from moedisco_ray.model_map.checkpoint import Checkpoint, open_checkpoint, read_config
from moedisco_ray.model_map.families import PARTS
from moedisco_ray.model_map.hf import config_values
from moedisco_ray.model_map.layout import ModelMap, Place

_MLP = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(PARTS)})_proj\.weight")
_OF_ITS_KIND = ("model_type", "architectures", "transformers_version")


class DenseMap(ModelMap):
    """A family's names for the tensors of its dense relatives, whose MLP is each layer's expert 0."""

    def unfold(self, key: str, shape: tuple[int, ...]) -> dict[str, Place]:
        """The canonical tensor that a stored one is.

        Raises:
            CheckpointError: No rule claims the key.
        """
        mlp = _MLP.fullmatch(key)
        if mlp is None:
            return super().unfold(key, shape)
        part = next(part for part in PARTS if part == mlp[2])
        return {self.expert_key(int(mlp[1]), 0, part): Place(key)}


class OneExpert(Mapping[str, Tensor]):
    """A dense checkpoint with the routers that it lacks: one row of zeros each, for its one expert."""

    def __init__(self, dense: Checkpoint) -> None:
        layers = range(int(dense.config["num_hidden_layers"]))
        self._dense = dense
        self._routers = {dense.model_map.router_key(layer): int(dense.config["hidden_size"]) for layer in layers}

    def __getitem__(self, key: str) -> Tensor:
        return torch.zeros(1, self._routers[key]) if key in self._routers else self._dense[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._dense
        yield from self._routers

    def __len__(self) -> int:
        return len(self._dense) + len(self._routers)


def open_dense(directory: Path, family: FamilyName) -> Mapping[str, Tensor]:
    """Open what an MoE is upcycled from: a dense relative of the family, or a model of the family with one expert.

    Args:
        directory: One whose sizes `Model.architecture` read: it is such a model.
        family: Of the MoE.

    Returns:
        Canonical tensors of a one-expert MoE, read when they are asked for.

    Raises:
        CheckpointError: It cannot be read.
    """
    if read_config(directory).get("model_type") == family:
        return open_checkpoint(directory)
    return OneExpert(open_checkpoint(directory, DenseMap(family)))


def upcycled_config(directory: Path, family: FamilyName, num_experts: int, num_experts_per_tok: int) -> dict[str, Any]:
    """The `config.json` of the MoE that a dense model becomes: its own, with experts in place of the MLP.

    The weights of a token's experts are made to sum to one, so that as long as the experts are equal the MoE computes what the
    dense model did.

    Args:
        directory: The dense model's.
        family: Of the MoE.
        num_experts: Per layer.
        num_experts_per_tok: Of those, for each token.
    """
    raw = read_config(directory)
    kind = str(raw.get("model_type"))
    declaration = ModelMap(family).family
    values = AutoConfig.for_model(kind, **{key: value for key, value in raw.items() if key != "model_type"}).to_dict()
    known = AutoConfig.for_model(family).to_dict().keys() - {*_OF_ITS_KIND}
    kept = {key: value for key, value in values.items() if key in known}
    if kind != family:
        kept[declaration.expert_size_field] = raw["intermediate_size"]
        if declaration.expert_size_field != "intermediate_size":
            kept |= {"decoder_sparse_step": 1, "mlp_only_layers": []}   # every layer is an MoE layer
    kept.pop("num_local_experts", None)
    kept |= {declaration.num_experts_field: num_experts, "num_experts_per_tok": num_experts_per_tok}
    if not declaration.always_normalises:
        kept["norm_topk_prob"] = True
    return config_values(AutoConfig.for_model(family, **kept))
