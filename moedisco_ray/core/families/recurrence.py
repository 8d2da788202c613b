"""Layers with a recurrent state in place of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

_ATTENTION_LAYER, _RECURRENT_LAYER = "full_attention", "linear_attention"
"""Kinds of layers in `layer_types` of transformers."""
_HEADS = ("linear_num_key_heads", "linear_num_value_heads")


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Layers with a recurrent state in place of attention: Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464).

    Configuration fields name the sizes: `linear_num_key_heads`, `linear_num_value_heads`, `linear_key_head_dim`,
    `linear_value_head_dim` and `linear_conv_kernel_dim`.

    Attributes:
        projections: Names of the matrices that read the layer's input.
        fused: Whether one of them gives queries, keys, values and gates together, whose parts are copied.
        interval_field: Configuration field with an interval i: layers i, 2i, ... have attention, all others a recurrent
            state.
    """

    projections: tuple[str, ...]
    fused: bool = False
    interval_field: str = "full_attention_interval"

    @property
    def pattern(self) -> str:
        """Regular expression of the tensors, relative to the layer."""
        matrices = "|".join((*self.projections, "out_proj", "conv1d", "norm"))
        return rf"linear_attn\.(({matrices})\.weight|A_log|dt_bias)"

    @property
    def fields(self) -> tuple[str, ...]:
        """The configuration fields with the interval and the sizes."""
        return (self.interval_field, *_HEADS, "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")

    def check(self, values: Mapping[str, Any], layers: int) -> None:
        """Check the interval and the sizes.

        Args:
            values: Values of `fields`.
            layers: Number of decoder layers.

        Raises:
            ValueError: A value is out of bounds, or no layer has attention.
        """
        for name, size in values.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} {size!r}: must be a whole number of at least 1")
        # transformers generates no text with a model whose cache has no keys and values.
        if (interval := values[self.interval_field]) > layers:
            raise ValueError(
                f"{self.interval_field} {interval}: none of the {layers} layers has attention; use at most {layers}"
            )
        key_heads, value_heads = (values[name] for name in _HEADS)
        if value_heads % key_heads:
            raise ValueError(
                f"linear_num_value_heads {value_heads} is not a multiple of linear_num_key_heads {key_heads}"
            )

    def interval(self, kinds: Sequence[str], fallback: int) -> int:
        """The interval of a model, from the kinds of its layers.

        Args:
            kinds: `layer_types` of a `config.json`.
            fallback: The interval if no layer has attention.

        Raises:
            ValueError: Attention is in other layers.
        """
        found = kinds.index(_ATTENTION_LAYER) + 1 if _ATTENTION_LAYER in kinds else max(fallback, len(kinds) + 1)
        if list(kinds) != [
            _ATTENTION_LAYER if number % found == 0 else _RECURRENT_LAYER for number in range(1, len(kinds) + 1)
        ]:
            raise ValueError(
                "layer_types: attention must be in every n-th layer, and no layer of another kind; use another model"
            )
        return found
