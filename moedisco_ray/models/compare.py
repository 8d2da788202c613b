"""Whether two models are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have equal type, shape and bits (a NaN equals itself, 0.0 does not equal -0.0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def differences(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of two models has, or whose tensors are not equal bit for bit."""
    return sorted([key for key in left if key not in right or not same_bits(left[key], right[key])]
                  + [key for key in right if key not in left])


def check_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Assert that two models are equal bit for bit.

    Raises:
        CheckpointError: They are not.
    """
    if found := differences(left, right):
        raise CheckpointError("tensor", found[0], f"differs between the two models, with {len(found) - 1} more")
