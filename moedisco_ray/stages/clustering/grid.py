"""A fixed-point grid for document vectors, on which sums are the same in any order.

A float32 holds 24 significant bits. Vectors are shifted so that the sample's mean is the origin, and then rounded to
multiples of a power of two, so that every coordinate has at most 23 bits. A coordinate is still a float32, with an
error no larger than float32's own rounding of the largest coordinate. A float64 holds the sum of 2^29 such coordinates
exactly, an int64 that of 2^39. Addition without rounding is associative, so k-means on such vectors does not depend on
the order of documents.

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
"""Bits of a coordinate without its sign, one less than the significant bits of a float32."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Origin and resolution of a grid.

    Attributes:
        origin_D: Point that is subtracted from every vector, float32.
        step: Power of two; every coordinate is a multiple of it.
        square_step: Power of two; squared norms are rounded to multiples of it before they are added up.
    """

    origin_D: Array
    step: float
    square_step: float

    @classmethod
    def covering(cls, origin_D: Array, peak: float, documents: int) -> Grid:
        """The finest grid for vectors with coordinates of at most `peak` relative to the origin.

        Args:
            origin_D: Point near the middle of the vectors, such as the sample's mean.
            peak: Maximum of the function `peak` over all vectors.
            documents: Number of vectors, or an upper bound of it.
        """
        # frexp rounds up to a power of two, so peak < 2**exponent.
        exponent = math.frexp(peak)[1] if peak > 0 else 0
        square = math.frexp(documents * len(origin_D) * peak**2)[1] if peak > 0 else 0
        return cls(origin_D.astype(np.float32), math.ldexp(1.0, exponent - _BITS), math.ldexp(1.0, square - 62))

    def snap(self, x_ND: Array) -> Array:
        """Subtract the grid's origin from vectors and round the result to the grid, float32."""
        scaled_ND = (x_ND.astype(np.float32) - self.origin_D) * np.float32(1 / self.step)
        return np.rint(scaled_ND, out=scaled_ND) * np.float32(self.step)

    def integers(self, sums: Array) -> Array:
        """Convert sums of snapped vectors (float64, exact) into int64 multiples of `step`."""
        return np.rint(sums / self.step).astype(np.int64)


def peak(x_ND: Array, origin_D: Array) -> float:
    """Largest absolute coordinate of vectors relative to the origin."""
    return float(np.abs(x_ND.astype(np.float32) - origin_D.astype(np.float32)).max(initial=0.0))
