"""Translation between the canonical tensors of a model and the tensors of a transformers model in memory.

The canonical form has the names of the family's original checkpoints, in most families with one tensor per expert and
projection. In memory, transformers stacks the experts of a layer, for every family: `mlp.experts.gate_up_proj` w_EGD
with G = 2F (gate, then up), and `mlp.experts.down_proj` w_EDF. A checkpoint may have that form too. Families whose
canonical form has stacks keep them as they are.

Shapes: E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import DECLARATIONS, PARTS, Part, unsupported
from moedisco_ray.models.roles import OUTSIDE_LAYERS, Role, TensorRole, layer_rules

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_NUMBER = re.compile(r"(\d+)")
_MEMORY_BLOCK = "mlp"
_FUSED: dict[str, tuple[Part, ...]] = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclasses.dataclass(frozen=True)
class Place:
    """The position of a canonical tensor in a stored tensor, which may hold several canonical tensors.

    Attributes:
        key: Name of the stored tensor.
        expert: Index along the first axis of a stack of experts; None if the stored tensor is not such a stack.
        half: Half of the second axis that belongs to the canonical tensor, 0 or 1; None if the whole axis does.
        transposed: Whether the stack has its last two axes in the other order, so that the half is one of the third.
    """

    key: str
    expert: int | None = None
    half: int | None = None
    transposed: bool = False

    def index(self, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
        """The index that selects the canonical tensor from a stored tensor of this shape."""
        if self.expert is None:
            return ()
        if self.half is None:
            return (self.expert,)
        size = shape[2 if self.transposed else 1] // 2
        half = slice(self.half * size, (self.half + 1) * size)
        return (self.expert, slice(None), half) if self.transposed else (self.expert, half)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the canonical tensor in a stored tensor of this shape."""
        if self.expert is None:
            return stored
        rows, *columns = reversed(stored[1:]) if self.transposed else stored[1:]
        return (rows if self.half is None else rows // 2, *columns)

    def bounds(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """First and last index plus one of the canonical tensor, along each axis of a stored tensor of this shape."""
        index = self.index(shape)
        found = [(each, each + 1) if isinstance(each, int) else (each.start, each.stop) for each in index]
        return (*found, *((0, size) for size in shape[len(found) :]))


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a canonical tensor that is in a block of a stored tensor, such as one worker's shard.

    Attributes:
        name: Name of the canonical tensor.
        of_block: Index of the part in the block.
        of_tensor: Index of the part in the canonical tensor.
        is_whole: Whether the block holds all of the canonical tensor.
    """

    name: str
    of_block: tuple[int | slice, ...]
    of_tensor: tuple[slice, ...]
    is_whole: bool


class ModelMap:
    """Names of a family's tensors, with their roles and their positions in memory and in checkpoints.

    Args:
        family: A Hugging Face `model_type`, one of `moedisco_ray.core.families.FAMILIES`.

    Raises:
        CheckpointError: The family is not supported.
    """

    def __init__(self, family: str) -> None:
        found = DECLARATIONS.get(family)
        if found is None:
            raise CheckpointError("model_type", family, unsupported(family))
        self.family = found
        self._rules = layer_rules(found)

    def classify(self, key: str) -> TensorRole:
        """The role of a canonical tensor.

        Raises:
            CheckpointError: The family has no such tensor.
        """
        if key in OUTSIDE_LAYERS or key in self.family.outside:
            return TensorRole(Role.BACKBONE, None, None, key)
        if layer := _LAYER.fullmatch(key):
            for role, pattern in self._rules:
                if match := pattern.fullmatch(layer[2]):
                    if role is Role.EXPERT and not self.family.stacks:
                        part = PARTS[self.family.projections.index(match["projection"])]
                        return TensorRole(role, int(layer[1]), int(match["expert"]), part)
                    axis = self.family.expert_axis(layer[2]) if role in (Role.EXPERT, Role.ROUTER) else None
                    return TensorRole(role, int(layer[1]), None, layer[2], axis)
        raise CheckpointError("tensor", key, f"is no tensor of family {self.family.name}; use a model of this family")

    def keeps_dtype(self, key: str) -> bool:
        """Whether a canonical tensor is not rounded with the weights.

        With a rounded correction, a router selects other experts.
        """
        correction = self.family.router.correction
        return correction is not None and key.endswith(f".{correction}")

    def expert_key(self, layer: int, expert: int, part: Part) -> str:
        """Canonical name of a projection of an expert, in families without stacks."""
        name = self.family.expert_name.format(expert=expert, projection=self.family.projection(part))
        return f"model.layers.{layer}.{self.family.block}.{name}"

    def renumbered(self, key: str, expert: int) -> str:
        """Canonical name of the same projection of another expert in the layer."""
        role = self.classify(key)
        part = next((part for part in PARTS if part == role.part), None)
        if role.layer is None or part is None:
            raise CheckpointError("tensor", key, "belongs to no expert")
        return self.expert_key(role.layer, expert, part)

    def router_key(self, layer: int, tensor: str | None = None) -> str:
        """Canonical name of a layer's router, or of another of its tensors."""
        router = self.family.router
        return self.block_key(layer, router.in_block(tensor or router.weight))

    def block_key(self, layer: int, name: str) -> str:
        """Canonical name of a tensor of a layer's MoE block, from its name in the block in memory."""
        return f"model.layers.{layer}.{self.family.in_checkpoint(name)}"

    def stored_tensors(self, key: str, shape: tuple[int, ...]) -> dict[str, Place]:
        """The canonical tensors that a stored tensor holds, with their positions; a stack of experts holds several.

        Args:
            key: Name of the stored tensor, in memory or in a checkpoint.
            shape: Shape of the stored tensor.

        Raises:
            CheckpointError: The family has no such tensor.
        """
        layer = _LAYER.fullmatch(key)
        block, _, rest = layer[2].partition(".") if layer else ("", "", "")
        if layer is None or block not in (_MEMORY_BLOCK, self.family.block):
            self.classify(key)
            return {key: Place(key)}
        index, (inner, _, name) = int(layer[1]), rest.partition(".")
        if inner == "experts" and name in _FUSED and len(shape) == 3 and not self.family.stacks:
            parts = _FUSED[name]
            return {
                self.expert_key(index, expert, part): Place(key, expert, half if len(parts) == 2 else None)
                for expert in range(shape[0])
                for half, part in enumerate(parts)
            }
        # A Mixtral checkpoint that was saved with in-memory names calls the router `mlp.gate.weight`.
        router = self.family.router
        has_own_name = inner == router.module or rest in {*self.family.renamed, *map(router.in_block, router.tensors)}
        canonical = self.block_key(index, rest) if has_own_name else key
        self.classify(canonical)
        return {canonical: Place(key)}

    def pieces(
        self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], block: tuple[int, ...]
    ) -> Iterator[Piece]:
        """The parts of canonical tensors in a block of a stored tensor.

        Args:
            key: Name of the stored tensor, in memory or in a checkpoint.
            shape: Shape of the stored tensor.
            offset: Index of the block's first element.
            block: Shape of the block.

        Raises:
            CheckpointError: The family has no such tensor.
        """
        for name, place in self.stored_tensors(key, shape).items():
            bounds = place.bounds(shape)
            common = [
                (max(start, first), min(stop, first + size))
                for (start, stop), first, size in zip(bounds, offset, block, strict=True)
            ]
            if any(start >= stop for start, stop in common):
                continue
            of_block: list[int | slice] = [
                slice(a - first, b - first) for (a, b), first in zip(common, offset, strict=True)
            ]
            of_tensor = [slice(a - start, b - start) for (a, b), (start, _) in zip(common, bounds, strict=True)]
            if place.expert is not None:  # the canonical tensor has no axis of experts
                of_block[0] = place.expert - offset[0]
                del of_tensor[0]
            yield Piece(name, tuple(of_block), tuple(of_tensor), is_whole=tuple(common) == bounds)

    def role_in_memory(self, key: str, shape: tuple[int, ...]) -> Role:
        """The role of a tensor, by its name in a transformers model in memory.

        Raises:
            CheckpointError: The family has no such tensor.
        """
        return self.classify(next(iter(self.stored_tensors(key, shape)))).role

    def sort_key(self, key: str) -> tuple[object, ...]:
        """Sort key of canonical names: embedding, layers by number, experts by number, head."""
        outside = 0 if "embed" in key else 2
        group = 1 if _LAYER.fullmatch(key) else outside
        return (group, *(int(piece) if piece.isdigit() else piece for piece in _NUMBER.split(key)))

    def experts(self, keys: Iterable[str]) -> dict[int, int]:
        """Number of experts per MoE layer, 0 for a stack.

        Checks that each layer has its router and all projections of its experts.

        Raises:
            CheckpointError: A name is unknown, or a layer is incomplete.
        """
        present = set(keys)
        roles = [self.classify(key) for key in present]
        counts = {role.layer: 0 for role in roles if role.layer is not None and role.role in (Role.EXPERT, Role.ROUTER)}
        for role in roles:
            if role.layer is not None and role.expert is not None:
                counts[role.layer] = max(counts[role.layer], role.expert + 1)
        for layer, count in counts.items():
            needed = {self.block_key(layer, f"experts.{name}") for name in self.family.stacks} or {
                self.expert_key(layer, e, part) for e in range(max(1, count)) for part in PARTS
            }
            needed |= {self.router_key(layer, name) for name in self.family.router.tensors}
            if needed - present:
                missing = min(needed - present)
                raise CheckpointError("tensor", missing, "is missing; the checkpoint is incomplete")
        return dict(sorted(counts.items()))


def canonical_state(state: Mapping[str, Tensor], model_map: ModelMap) -> dict[str, Tensor]:
    """The state dict of a transformers model under canonical names. Expert tensors are views; no tensor is copied.

    Raises:
        CheckpointError: The family has no such tensor, or a canonical tensor occurs twice.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for name, place in model_map.stored_tensors(key, tuple(tensor.shape)).items():
            if name in found:
                raise CheckpointError("tensor", name, "occurs twice, in two forms")
            found[name] = tensor[place.index(tuple(tensor.shape))] if place.expert is not None else tensor
    return dict(sorted(found.items(), key=lambda item: model_map.sort_key(item[0])))
