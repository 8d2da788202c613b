"""A package `torch` for other processes, one of whose cards fails in some way."""

from __future__ import annotations

from pathlib import Path

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12060). Please update your GPU driver"
NO_CUDA = "Torch not compiled with CUDA enabled"
FAILURES = {
    "fine": "pass",
    "too old": f"raise RuntimeError({TOO_OLD!r})",
    "missing": f"raise AssertionError({NO_CUDA!r})",
    "wrong": "return Numbers(-1.0)",
    "hangs": "time.sleep(3600)",
}
_TORCH = """
import time
from torch import cuda

__version__ = "2.13.0"


class version:
    cuda = "13.0"


class Numbers:
    def __init__(self, value):
        self._value = value

    def reshape(self, *_sizes):
        return self

    def __matmul__(self, _other):
        return self

    def sum(self):
        return self

    def item(self):
        return self._value


def arange(end, device):
    if device == "cuda:{card}":
        {failure}
    return Numbers(end)
"""
_CUDA = """
class DeferredCudaCallError(Exception):
    pass


def get_device_name(device):
    return "NVIDIA L4"
"""


def write_torch(folder: Path, failure: str, card: int = 0) -> Path:
    """Write the package, and return the folder for `PYTHONPATH`.

    Args:
        folder: Folder to make.
        failure: How a card fails, a name of `FAILURES`.
        card: Index of this card; the others work.
    """
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_TORCH.format(card=card, failure=FAILURES[failure]))
    (package / "cuda.py").write_text(_CUDA)
    return folder
