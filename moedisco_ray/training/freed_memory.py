"""Memory that a training on a CPU frees and allocates again in the next step.

The C library returns large blocks to the operating system when they are freed. The next step then allocates them anew, and the
operating system clears each page when it is first written. In a training step on one processor this takes up to a tenth of the time
(`benchmarks/training_step.py`).
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
    """Keep memory that is freed in a CPU training for later steps; return it to the operating system at the end.

    Blocks that are allocated come from one heap from then on, in this process, also after the end: trimming gives back all free
    pages of it. On a GPU, and with a C library other than glibc, nothing happens.

    Args:
        device: Torch device that the training computes on.
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
