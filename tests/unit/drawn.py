"""How many examples a property draws: few in `make test`, many where every family has its cases."""

from __future__ import annotations

import os


def examples(few: int, many: int) -> int:
    """The number of examples; many with ALL_FAMILIES, as in CI for a change that may reach any family."""
    return many if "ALL_FAMILIES" in os.environ else few
