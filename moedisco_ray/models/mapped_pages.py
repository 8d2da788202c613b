"""Bring the pages of files that are mapped into memory: a tensor of a safetensors file is such a part of a file.

Reading mapped memory waits at every few pages, first for the disk and then for the operating system to map them, which
takes two to three times as long as reading the file. Both can be asked for at once. On systems without these calls,
nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

from torch import Tensor

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python's `mmap` does not name."""


def read_soon(tensors: Iterable[Tensor]) -> None:
    """Let the operating system start to read tensors of mapped files from the disk."""
    for tensor in tensors:
        _advise(tensor, getattr(mmap, "MADV_WILLNEED", None))


def map_pages(tensor: Tensor) -> Tensor:
    """Read a tensor of a mapped file and map all its pages, before all of it is used.

    Returns:
        The same tensor.
    """
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        _advise(tensor, _POPULATE_READ)
    return tensor


def drop_pages(tensor: Tensor) -> None:
    """Take the pages of a tensor of a mapped file out of the memory of the process, until it is read again."""
    _advise(tensor, getattr(mmap, "MADV_DONTNEED", None))


def _advise(tensor: Tensor, advice: int | None) -> None:
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None or advice is None or not tensor.nbytes:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    advise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
