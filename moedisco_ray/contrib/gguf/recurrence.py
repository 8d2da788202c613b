"""Recurrent layers in a GGUF file (Gated DeltaNet, arXiv 2412.06464).

llama.cpp has the queries of all heads, then all keys and all values in one tensor, and the gates of the output in
another. Its rates of decay are negative numbers in place of logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.families import Family


def recurrent_parts(
    key: str, family: Family, config: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The tensors of a file that a tensor of a recurrent layer becomes: names, and functions that compute them.

    Args:
        key: Canonical name of the tensor.
        family: A family that llama.cpp knows.
        config: Values of the model's `config.json`.
    """
    keys, values, size = (
        int(config[name]) for name in ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
    )
    tiles = family.gguf is not None and family.gguf.tiles_values

    def order(width: int) -> Tensor:
        """The rows of all value heads, `width` of each head, as llama.cpp orders them."""
        rows = torch.arange(values * width)
        return rows.view(keys, -1, width).transpose(0, 1).flatten() if tiles else rows

    heads, channels = order(1), order(size)
    together = torch.cat([torch.arange(2 * keys * size), 2 * keys * size + channels])  # queries, keys and values
    rows = {
        "in_proj_qkv.weight": together,
        "in_proj_z.weight": channels,
        "in_proj_a.weight": heads,
        "in_proj_b.weight": heads,
        "dt_bias": heads,
    }
    name = key.rpartition("linear_attn.")[2]
    if name == "in_proj_qkvz.weight":  # queries, keys, values and gates of one key head follow each other
        each = [size, size, values // keys * size, values // keys * size]
        parts = torch.split(torch.arange(keys * sum(each)).view(keys, -1), each, dim=1)
        yield key.replace("qkvz", "qkv"), _select(torch.cat([part.flatten() for part in parts[:3]]))
        yield key.replace("qkvz", "z"), _select(parts[3].flatten())
    elif name == "conv1d.weight":  # of shape [channels, 1, kernel]
        yield key, lambda tensor: tensor[together, 0]
    elif name == "A_log":
        yield key, lambda tensor: -tensor.float().exp()[heads]
    elif name == "out_proj.weight":
        yield key, lambda tensor: tensor[:, channels]
    else:
        yield key.replace("dt_bias", "dt_proj.bias"), _select(rows[name]) if name in rows else lambda tensor: tensor


def _select(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[rows]
