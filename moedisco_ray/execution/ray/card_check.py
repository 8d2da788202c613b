"""Check that torch can compute on the GPU that a worker holds.

Without this check, a worker whose torch cannot use its GPU would train on the CPU while the GPU is paid for. Causes are
an old driver, a torch build without CUDA, and a broken card.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import ray
import torch
from torch.cuda import DeferredCudaCallError

from moedisco_ray.core.errors import CardError
from moedisco_ray.core.printable import one_line
from moedisco_ray.core.store.locations import first_line

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""Text of the NVIDIA kernel module about itself. Unlike `nvidia-smi`, it does not hang with a broken card."""
_DRIVER_VERSION = re.compile(r"\b\d+\.\d+(?:\.\d+)?\b")
_SIDE = 8
"""Rows of the matrix to multiply: large enough for a kernel, and small enough for exact sums in any precision."""
_OUT_OF_MEMORY = "out of memory"


def check_card(field: str) -> None:
    """Multiply a matrix on this worker's GPU, and compare the result with the CPU's.

    Ray Train lets each worker of a gang see the GPUs of all workers on its node; the one that Ray gave to this process
    is checked. A GPU whose memory other processes hold passes: what needs the memory says so itself.

    Args:
        field: Setting that asks for the GPU, such as `pools.low_memory.gpu`.

    Raises:
        CardError: torch cannot compute on the GPU.
    """
    card, device = _own_card()
    try:
        found, expected = _product_sum(device), _product_sum("cpu")
    except (RuntimeError, AssertionError, OSError, DeferredCudaCallError) as error:
        reason = first_line(error)
        if _OUT_OF_MEMORY in reason.lower():
            return
    else:
        if found == expected:
            return
        reason = f"it computes {found:g} in place of {expected:g}"
    raise CardError(
        field,
        1,
        f"torch cannot use {_named(card, device)} of node {socket.gethostname()} ({ray.util.get_node_ip_address()}): "
        f"{one_line(reason)} ({_torch()}, {_driver()}); install a driver there that fits torch's CUDA, or a torch "
        f"build that fits the driver, or set {field}=0",
        ray.get_runtime_context().get_node_id(),
    )


def _product_sum(device: str) -> float:
    numbers_NN = torch.arange(float(_SIDE * _SIDE), device=device).reshape(_SIDE, _SIDE)
    return float((numbers_NN @ numbers_NN).sum().item())


def _own_card() -> tuple[str, str]:
    """The GPU that Ray gave to this process: its index on the machine, and torch's name for it."""
    held = [str(index) for index in ray.get_gpu_ids()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not held or held[0] not in visible:
        return "0", "cuda:0"
    return held[0], f"cuda:{visible.index(held[0])}"


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
