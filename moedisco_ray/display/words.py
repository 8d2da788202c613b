"""Numbers as people read them."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: float) -> str:
    """Three digits and a unit: `812`, `1.20M`, `14.3B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            value = number / size
            return f"{value:.{max(0, 2 - int(math.log10(max(1.0, abs(value) * 1.0005))))}f}{unit}"
    return f"{number:.0f}"


def dollars(amount: float) -> str:
    """Cents, and where those say nothing two digits that do."""
    if amount == 0 or amount >= 0.995:
        return f"${amount:,.2f}"
    return f"${amount:.2g}" if amount < 0.01 else f"${amount:.3f}"


def gigabytes(size: float) -> str:
    """Bytes as GB of 2^30, the way GPUs are sold."""
    value = size / 2**30
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(share: float) -> str:
    """A share of one as a percentage without decimals."""
    return f"{100 * share:.0f} %"
