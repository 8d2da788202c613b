"""Memory that a computation on a CPU frees and allocates again: activations of each step, a layer's weights in fp32.

The C library returns large blocks to the operating system when they are freed. When they are allocated anew, the
operating system clears each page at the first write. That takes up to a tenth of a training step
(`benchmarks/training_step.py`), and more where layers are streamed (`benchmarks/true_sizes.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's `mallopt`."""
_NEVER = 2**31 - 1


@contextlib.contextmanager
def reused_memory(device: str) -> Iterator[None]:
    """Use memory that is freed on a CPU again; return it to the operating system at the end.

    From then on this process allocates large blocks in its heap, and the end returns all free pages of it. A thread
    other than the first has heaps that are smaller than its largest blocks, and saves less. On a GPU, and with a C
    library other than glibc, nothing happens.

    Args:
        device: Torch device that computes.
    """
    library = ctypes.CDLL(None)
    if torch.device(device).type != "cpu" or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    library.mallopt(_M_MMAP_MAX, 0)
    try:
        yield
    finally:
        library.malloc_trim(0)
