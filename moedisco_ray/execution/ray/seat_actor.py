"""The actor of a seat: a process that holds a slot and runs functions.

It starts quickly, because this module imports only Ray.

Whatever a function leaves behind must not affect the next one in the same process: GPU memory, compiled code, or a GPU
context that an error has broken.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import ray

_MAX_LEFT_BYTES = 64 << 20
"""GPU memory that a function may leave allocated (bytes): CUDA's libraries keep workspaces, which are smaller than
this."""


class Seat:
    """Runs functions in the process that holds a slot, one after the other. Ray shows the class under this name."""

    def __init__(self) -> None:
        self._left_bytes = 0
        self._has_run = False
        if not ray.get_gpu_ids():
            # Ray does not hide GPUs from an actor that holds none, and Ray Train's local mode would train on any GPU
            # that it sees.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def node(self) -> str:
        """Id of the seat's node.

        Raises:
            RuntimeError: An earlier function left memory allocated on the GPU, so that the next one might not fit.
        """
        if self._left_bytes > _MAX_LEFT_BYTES:
            raise RuntimeError(f"earlier work left {self._left_bytes} bytes on the GPU")
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def check(self, function: Callable[[], None]) -> None:
        """Call a function that raises an error if the slot is of no use, before the first work."""
        function()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function, then free the memory that it left.

        If the function raises an error, the caller must end this process.
        """
        found = function()
        self._left_bytes = clear(sys.modules)
        if not self._has_run:
            # the modules that the first function has imported; to look through them takes a third of a second
            gc.freeze()
            self._has_run = True
        return found


def clear(modules: dict[str, Any]) -> int:
    """Free the memory that the last function left in the process and on the GPU.

    Args:
        modules: The modules that the process has imported (`sys.modules`).

    Returns:
        Bytes that are still allocated on the GPU.

    Raises:
        RuntimeError: An error has broken the GPU's context, so that every later GPU call in this process would fail.
    """
    gc.collect()  # a model and its gradients form reference cycles
    if "torch._dynamo" in modules:
        # Compiled code keeps its model alive. After eight models of one class, torch would stop compiling without a
        # message.
        modules["torch"].compiler.reset()
    cuda = modules["torch"].cuda if "torch" in modules else None
    if cuda is None or not cuda.is_initialized():
        return 0
    cuda.synchronize()  # raises errors of the last function's kernels that no call has reported yet
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    return int(cuda.memory_allocated())
