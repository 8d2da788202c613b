"""Dense models as Mixture-of-Experts models whose only expert is the MLP: the start of sparse upcycling.

Shapes: D hidden, H attention heads, G key-value heads, d size of one head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from moedisco_ray.core.config import EXPERT_COUNTS, FamilyName
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import PARTS
from moedisco_ray.models.checkpoint import Checkpoint, open_checkpoint, read_config
from moedisco_ray.models.hf import config_values
from moedisco_ray.models.layout import ModelMap, Place

_MLP = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(PARTS)})_proj\.weight")
_BIAS = re.compile(r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.bias")
_MODEL_SPECIFIC = ("model_type", "architectures", "transformers_version")
_FOLD_TOLERANCE = 1e-5
"""Maximum error when a bias of the values replaces an output bias, as a share of the output bias' largest element;
about 100 times the rounding error of fp32."""


class DenseMap(ModelMap):
    """Tensor names of the dense models related to an MoE family.

    Each layer's MLP maps to expert 0, and biases keep their names.

    In families that store experts in stacks, the MLP keeps its names too, since a stack holds two of its matrices.
    """

    def stored_tensors(self, key: str, shape: tuple[int, ...]) -> dict[str, Place]:
        """The canonical tensor that a stored tensor holds, with its position.

        Raises:
            CheckpointError: The family has no such tensor.
        """
        if _BIAS.fullmatch(key):
            return {key: Place(key)}
        mlp = _MLP.fullmatch(key)
        if mlp is None:
            return super().stored_tensors(key, shape)
        if self.family.stacks:
            return {key: Place(key)}
        part = next(part for part in PARTS if part == mlp[2])
        return {self.expert_key(int(mlp[1]), 0, part): Place(key)}


class OneExpert(Mapping[str, Tensor]):
    """A dense checkpoint as an MoE with one expert: missing tensors are added, and unsupported biases removed.

    If the family stores experts in stacks, the MLP's matrices are joined to stacks of one expert on access.

    A router is one row of zeros. If the family has a shared expert, it is a copy of the MLP. A gate of zeros weights it
    by 1/2; if it has no gate, its output is halved. The routed expert's output is halved too, so that both add up to
    the MLP. The first layer of a router is random, with outputs of variance 1 for a normalised input.

    A bias that the MoE does not support must be zero, except for some biases of the attention output. Attention weights
    sum to 1, so a bias b of the output has the same effect as a bias v of the values with W v = b, where W is the
    output projection. If such a v exists (usually so with one key-value head per attention head), it is added to the
    bias of the values.

    Args:
        dense: Dense checkpoint, opened with a `DenseMap`.
        biases: Whether the MoE has biases of queries, keys and values, and whether it has one of the attention output.
        experts: Experts of a layer of the MoE that the dense model becomes.

    Raises:
        CheckpointError: An unsupported bias is not zero.
    """

    def __init__(self, dense: Checkpoint, biases: tuple[bool, bool], experts: int) -> None:
        self._dense = dense
        self._made: dict[str, Tensor] = {}
        self._copied: dict[str, str] = {}
        self._stacked: dict[str, list[str]] = {}
        self._halved: set[str] = set()
        names, hidden = dense.model_map, int(dense.config["hidden_size"])
        router, units = names.family.router, names.family.router.hidden_size({}, experts)
        for layer in range(int(dense.config["num_hidden_layers"])):
            self._made[names.router_key(layer)] = torch.zeros(1, units or hidden)
            for name in router.tensors[1:]:
                shape = (1, hidden) if name == router.noise else (1,) * (1 + names.family.expert_axis(name))
                self._made[names.router_key(layer, name)] = torch.zeros(shape)
            if router.hidden is not None:
                drawn = torch.empty(units, hidden).normal_(generator=torch.Generator().manual_seed(layer))
                self._made[names.block_key(layer, f"{router.module}.{router.hidden}")] = drawn * hidden**-0.5
            if names.family.stacks:
                mlp = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in PARTS]
                self._stacked[names.block_key(layer, "experts.gate_up_proj")] = mlp[:2]
                self._stacked[names.block_key(layer, "experts.down_proj")] = mlp[2:]
            if (shared := names.family.shared) is not None:
                block = f"model.layers.{layer}.{names.family.block}"
                self._copied |= {
                    f"{block}.{shared.name}.{part}_proj.weight": names.expert_key(layer, 0, part) for part in PARTS
                }
                self._halved.add(names.expert_key(layer, 0, "down"))
                if shared.gate is None:
                    self._halved.add(f"{block}.{shared.name}.down_proj.weight")
                else:
                    self._made[f"{block}.{shared.gate}.weight"] = torch.zeros(1, hidden)
        inner = {key for keys in self._stacked.values() for key in keys}
        self._kept = [key for key in dense if key not in inner and _is_supported(key, biases)]
        for key in sorted(dense.keys() - {*self._kept} - inner):
            if dense[key].any():
                self._fold_bias(key, has_biases=biases[0])

    def __getitem__(self, key: str) -> Tensor:
        if key in self._made:
            return self._made[key]
        if key in self._stacked:
            return torch.cat([self._dense[part] for part in self._stacked[key]])[None]
        found = self._dense[self._copied[key]].clone() if key in self._copied else self._dense[key]
        return found * 0.5 if key in self._halved else found

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._kept, *self._made, *self._copied, *self._stacked])

    def __len__(self) -> int:
        return len({*self._kept, *self._made, *self._copied, *self._stacked})

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if key in self._stacked:
            parts = [self._dense.shape(part) for part in self._stacked[key]]
            return (1, sum(rows for rows, *_ in parts), *parts[0][1:])
        return tuple(self._made[key].shape) if key in self._made else self._dense.shape(self._copied.get(key, key))

    def read_ahead(self, keys: Iterable[str], reader: Executor) -> None:
        """Start reading tensors into the page cache; see `Checkpoint.read_ahead`."""
        sources = (self._stacked.get(key) or [self._copied.get(key, key)] for key in keys if key not in self._made)
        self._dense.read_ahead({part for parts in sources for part in parts}, reader)

    def _fold_bias(self, key: str, *, has_biases: bool) -> None:
        values = key.replace("o_proj", "v_proj")
        if has_biases and values != key and values in self._dense:
            bias_D = self._dense[key].double()
            w_DGd = self._dense[key.replace(".bias", ".weight")].double()
            heads = int(self._dense.config["num_attention_heads"])
            groups = int(self._dense.config.get("num_key_value_heads") or heads)
            w_DGd = w_DGd.view(len(bias_D), groups, heads // groups, -1).sum(2).reshape(len(bias_D), -1)
            added_Gd = torch.linalg.lstsq(w_DGd, bias_D[:, None], driver="gelsd").solution[:, 0]
            if (w_DGd @ added_Gd - bias_D).abs().max() <= _FOLD_TOLERANCE * bias_D.abs().max():
                self._made[values] = (self._dense[values].double() + added_Gd).float()
                return
        family, directory = self._dense.model_map.family.name, str(self._dense.directory)
        raise CheckpointError(
            "tensor",
            key,
            f"of {directory} is not zero, and transformers' {family} has no such bias; "
            + (
                "use model.family qwen2_moe, with biases of queries, keys and values"
                if ".self_attn." in key and not has_biases
                else "use a model without it"
            ),
        )


def open_dense(directory: Path, family: FamilyName, experts: int) -> Checkpoint | OneExpert:
    """Open the start model of upcycling: a dense relative of the family, or a model of the family with one expert.

    `Model.architecture` must have checked that the directory holds one of these.

    Args:
        directory: Directory of the model.
        family: Family of the MoE.
        experts: Experts of a layer of the MoE that the model becomes, for the size of its router's first layer.

    Returns:
        Canonical tensors of an MoE with one expert, read on access.

    Raises:
        CheckpointError: The directory cannot be read, or a bias that the family does not support is not zero.
    """
    config = read_config(directory)
    if config.get("model_type") == family:
        return open_checkpoint(directory)
    return OneExpert(
        open_checkpoint(directory, DenseMap(family)), ModelMap(family).family.keeps_biases(config), experts
    )


def _is_supported(key: str, biases: tuple[bool, bool]) -> bool:
    bias = _BIAS.fullmatch(key)
    return bias is None or (bias[2].startswith("self_attn.") and biases[bias[2] == "self_attn.o_proj"])


def upcycled_config(
    directory: Path, family: FamilyName, num_experts: int, num_experts_per_tok: int, split: int = 1
) -> dict[str, Any]:
    """The `config.json` values of an upcycled MoE: those of the dense model, with experts in place of the MLP.

    The weights of a token's experts sum to one. So as long as all experts are equal, the MoE computes the same as the
    dense model. Experts have 1 / `split` of the MLP's hidden units; a shared expert keeps all of them.
    """
    raw = read_config(directory)
    dense_type = str(raw.get("model_type"))
    declaration = ModelMap(family).family
    values = AutoConfig.for_model(
        dense_type, **{key: value for key, value in raw.items() if key != "model_type"}
    ).to_dict()
    known = AutoConfig.for_model(family).to_dict().keys() - {*_MODEL_SPECIFIC}
    kept = {key: value for key, value in values.items() if key in known}
    kept["pad_token_id"] = None  # transformers would exclude that token's embedding from training
    if dense_type != family:
        attention, shared = declaration.attention, declaration.shared
        kept |= {**declaration.constants, **declaration.fields_of_dense(raw)}
        kept[declaration.expert_size_field] = raw["intermediate_size"]
        if attention.own_head_dim:
            # Some families read it, but their configuration class does not declare it; others have a default of their
            # own.
            kept["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        if shared is not None and shared.size_field is not None:
            kept[shared.size_field] = raw["intermediate_size"]
        fields = {**declaration.fields, **declaration.read_fields(values)}
        kept |= {name: value for name, value in fields.items() if name not in {*values, *kept}}
    if split > 1:
        kept[declaration.expert_size_field] //= split
        if declaration.shared is not None and declaration.shared.count_field is not None:
            kept[declaration.shared.count_field] = split * (kept[declaration.shared.count_field] or 0)
    for name in EXPERT_COUNTS:
        kept.pop(name, None)
    kept |= {declaration.num_experts_field: num_experts, declaration.router.top_k_field: num_experts_per_tok}
    if declaration.router.normalises == "by_setting":
        kept["norm_topk_prob"] = True
    return config_values(AutoConfig.for_model(family, **kept))
