"""The process of a seat. It imports only Ray, so that a seat holds its slot for no longer than necessary before it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray


class Seat:
    """Runs functions in the process that holds a slot, one after the other. Ray shows the class under this name."""

    def node(self) -> str:
        """Id of the seat's node."""
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function; the first call imports torch."""
        return function()
