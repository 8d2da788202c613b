"""Quantised weights of published checkpoints: which `quantization_config` in a `config.json` can be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.errors import CheckpointError

QUANTISED = "quantization_config"
"""Field of a `config.json` that describes quantised weights."""


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised.

    Attributes:
        block: Rows and columns of a matrix of fp8 numbers that share a scale; None if the whole matrix does.
        is_mxfp4: Whether experts are stored in 4 bits with a scale per 32 numbers, instead of fp8.
    """

    block: tuple[int, int] | None = None
    is_mxfp4: bool = False


def quantisation(config: Mapping[str, Any], setting: str, place: str) -> Quantisation | None:
    """How the weights of a checkpoint are quantised, from its `config.json`; None if they are not.

    Args:
        config: Values of the `config.json`.
        setting: Setting or kind of file that an error names.
        place: Directory that an error names.

    Raises:
        CheckpointError: Weights that are quantised in this way cannot be read.
    """
    values = config.get(QUANTISED)
    if not values:
        return None
    fields: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    if method == "mxfp4":
        return Quantisation(is_mxfp4=True)
    if method == "fp8" and block is None:
        return Quantisation()
    if method == "fp8" and isinstance(block, list) and [type(size) for size in block] == [int, int] and min(block) > 0:
        return Quantisation((block[0], block[1]))
    raise CheckpointError(
        setting,
        place,
        f"holds weights quantised by {method!r}{f' in blocks of {block!r}' if method == 'fp8' else ''}; mxfp4 "
        "(gpt-oss), fp8 in blocks (DeepSeek-V3) and fp8 with a scale per tensor can be read; use a checkpoint in one "
        "of these or in bf16",
    )
