"""Counts, sizes and shares as people read them; durations and dollars are as the report writes them."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """Three digits and a unit: `812`, `1.20M`, `14.3B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            value = number / size
            return f"{value:.{max(0, 2 - int(math.log10(max(1.0, abs(value) * 1.0005))))}f}{unit}"
    return f"{number:.0f}"


def gigabytes(size: float) -> str:
    """Bytes as GB of 2^30, the way GPUs are sold."""
    value = size / 2**30
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(share: float) -> str:
    """A share of one as a percentage without decimals."""
    return f"{100 * share:.0f} %"
