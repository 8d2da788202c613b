"""A fixed-point grid for document vectors, on which sums come out the same in any order.

A float32 holds 24 significant bits. Vectors are moved so that the sample's mean is the origin and then rounded to
multiples of a power of two, chosen so that every coordinate has at most 23 bits. Each still is a float32, off by no
more than float32's own rounding of the largest coordinate; but a float64 now adds 2^29 of them without any rounding,
and an int64 adds 2^39. Addition without rounding is associative: k-means on such vectors does not depend on how
documents are cut into blocks, or on their order.

Shapes: N documents, D dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_BITS = 23


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where vectors lie.

    Attributes:
        origin_D: float32; is subtracted from every vector.
        step: The power of two that every coordinate is a multiple of.
        square_step: The power of two that squared norms are rounded to before they are added up.
    """

    origin_D: Array
    step: float
    square_step: float

    @classmethod
    def covering(cls, origin_D: Array, peak: float, documents: int) -> Grid:
        """The finest grid for vectors whose distance to the origin is at most `peak` in every coordinate.

        Args:
            origin_D: A point near the middle of the vectors, such as the sample's mean.
            peak: From `peak` below, over all blocks.
            documents: At least the number of vectors in all blocks together.
        """
        # frexp rounds up to a power of two: peak < 2**exponent.
        exponent = math.frexp(peak)[1] if peak > 0 else 0
        square = math.frexp(documents * len(origin_D) * peak**2)[1] if peak > 0 else 0
        return cls(origin_D.astype(np.float32), math.ldexp(1.0, exponent - _BITS), math.ldexp(1.0, square - 62))

    def snap(self, x_ND: Array) -> Array:
        """Vectors relative to the origin and rounded to the grid, as float32."""
        scaled_ND = (x_ND.astype(np.float32) - self.origin_D) * np.float32(1 / self.step)
        return np.rint(scaled_ND, out=scaled_ND) * np.float32(self.step)

    def integers(self, sums: Array) -> Array:
        """Sums of snapped vectors (float64, exact) in units of `step`, as int64."""
        return np.rint(sums / self.step).astype(np.int64)


def peak(x_ND: Array, origin_D: Array) -> float:
    """The largest coordinate of the vectors relative to the origin; the maximum over blocks is the maximum over all."""
    return float(np.abs(x_ND.astype(np.float32) - origin_D.astype(np.float32)).max(initial=0.0))
