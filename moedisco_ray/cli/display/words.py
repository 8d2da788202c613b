"""Counts, sizes and shares as people read them; durations and dollars are as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


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


def let_go(data: Mapping[str, Any]) -> str:
    """What the merge takes of a sub-model that it does not wait for, from the event that says so."""
    taken = f"its checkpoint of step {data.get('steps', 0)}" if data.get("contribution") == "checkpoint" else "its seed"
    return f"not waited for, the merge takes {taken}: {data.get('reason', '')}"
