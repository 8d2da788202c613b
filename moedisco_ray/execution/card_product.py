"""Check that torch can compute on a GPU: multiply a matrix there, and compare the result with the CPU's.

Without this check, a worker whose torch cannot use its GPU would train on the CPU while the GPU is paid for. Causes are
an old driver, a torch build without CUDA, and a broken card.

    python -m moedisco_ray.execution.card_product FIELD COUNT

prints the line about the first of this machine's first COUNT cards that fails; `cards.check_cards` runs it.
"""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import torch
from torch.cuda import DeferredCudaCallError

from moedisco_ray.core.printable import one_line
from moedisco_ray.core.store.locations import first_line

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""Text of the NVIDIA kernel module about itself. Unlike `nvidia-smi`, it does not hang with a broken card."""
_DRIVER_VERSION = re.compile(r"\b\d+\.\d+(?:\.\d+)?\b")
_SIDE = 8
"""Rows of the matrix to multiply: large enough for a kernel, and small enough for exact sums in any precision."""
_OUT_OF_MEMORY = "out of memory"


def failure(field: str, card: str, device: str, address: str | None = None) -> str | None:
    """Why torch cannot compute on a GPU, and what to do; None if it can.

    A GPU whose memory other processes hold passes: what needs the memory says so itself.

    Args:
        field: Setting that asks for the GPU, such as `pools.low_memory.gpu`.
        card: Index of the GPU on this machine.
        device: torch's name for the GPU.
        address: Address of this machine in the Ray cluster, if it is in one.
    """
    try:
        found, expected = _product_sum(device), _product_sum("cpu")
    except (RuntimeError, AssertionError, OSError, DeferredCudaCallError) as error:
        reason = first_line(error)
        if _OUT_OF_MEMORY in reason.lower():
            return None
    else:
        if found == expected:
            return None
        reason = f"it computes {found:g} in place of {expected:g}"
    node = socket.gethostname() if address is None else f"{socket.gethostname()} ({address})"
    return (
        f"torch cannot use {_named(card, device)} of node {node}: {one_line(reason)} ({_torch()}, {_driver()}); "
        "install a driver there that fits torch's CUDA, or a torch build that fits the driver, or set "
        f"{field}=0"
    )


def _product_sum(device: str) -> float:
    numbers_NN = torch.arange(float(_SIDE * _SIDE), device=device).reshape(_SIDE, _SIDE)
    return float((numbers_NN @ numbers_NN).sum().item())


def _named(card: str, device: str) -> str:
    """The GPU's index, and its product name if torch knows it."""
    try:
        return f"card {card} ({one_line(torch.cuda.get_device_name(device))})"
    except (RuntimeError, AssertionError, OSError, DeferredCudaCallError):
        return f"card {card}"


def _torch() -> str:
    cuda = torch.version.cuda
    return f"torch {torch.__version__} {f'for CUDA {cuda}' if cuda else 'without CUDA'}"


def _driver() -> str:
    try:
        version = _DRIVER_VERSION.search(_DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "no NVIDIA driver found"
    return f"NVIDIA driver {version.group()}" if version else "unknown NVIDIA driver"


if __name__ == "__main__":
    failures = (failure(sys.argv[1], str(card), f"cuda:{card}") for card in range(int(sys.argv[2])))
    print(next((found for found in failures if found is not None), ""))  # noqa: T201 - what the caller reads
