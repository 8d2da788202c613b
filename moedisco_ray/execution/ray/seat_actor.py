"""The process of a seat. It imports only Ray, so that a seat holds its slot for no longer than necessary before it reports.

What one piece of work leaves on the GPU must not reach the next: memory, compiled code, or a context that an error broke.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import ray

_MAX_LEFT_BYTES = 64 << 20
"""GPU memory that may stay allocated between two pieces of work (bytes): more than the workspaces that CUDA's libraries keep."""


class Seat:
    """Runs functions in the process that holds a slot, one after the other. Ray shows the class under this name."""

    def __init__(self) -> None:
        self._left_bytes = 0
        if not ray.get_gpu_ids():
            # Ray hides no GPU from an actor that holds none, and Ray Train's local mode trains on any GPU that it sees.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def node(self) -> str:
        """Id of the seat's node.

        Raises:
            RuntimeError: Earlier work left memory on the GPU, so that the next might not fit.
        """
        if self._left_bytes > _MAX_LEFT_BYTES:
            raise RuntimeError(f"earlier work left {self._left_bytes} bytes on the GPU")
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function; the first call imports torch. After an error the process is to be ended."""
        found = function()
        self._left_bytes = clear(sys.modules)
        return found


def clear(modules: dict[str, Any]) -> int:
    """Free what the last work left in memory and on the GPU.

    Args:
        modules: The process' imported modules.

    Returns:
        Bytes that are still allocated on the GPU.

    Raises:
        RuntimeError: An error has broken the GPU's context: every later call in this process would fail.
    """
    gc.collect()    # a model and its gradients refer to each other
    if "torch._dynamo" in modules:
        # Compiled code keeps its model alive, and after eight models of one class torch would silently compile no more.
        modules["torch"].compiler.reset()
    cuda = modules["torch"].cuda if "torch" in modules else None
    if cuda is None or not cuda.is_initialized():
        return 0
    cuda.synchronize()  # raises what a kernel of the last work did wrong, which no call has reported yet
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    return int(cuda.memory_allocated())
