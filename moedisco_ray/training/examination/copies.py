"""Speed of copies: between a card and the machine's memory, and within that memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from moedisco_ray.core.records.measurements import Copies

_BYTES = 256 * 2**20
_REPEATS = 5


def copy_speeds(device: str, size: int = _BYTES) -> Copies:
    """Speed of copies of pinned memory to a card and from it (bytes/s)."""
    there, here = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    near, far = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]  # torch's

    def to_card() -> None:
        with torch.cuda.stream(streams[0]):
            near.copy_(there, non_blocking=True)

    def from_card() -> None:
        with torch.cuda.stream(streams[1]):
            here.copy_(far, non_blocking=True)

    def both() -> None:
        to_card()
        from_card()

    rates = [size / _seconds(copy, device) for copy in (to_card, from_card, both)]
    return Copies(to_card=rates[0], from_card=rates[1], both=rates[2])


def speed_to_card(device: str, seconds: float, size: int = _BYTES) -> float:
    """Mean speed of copies of pinned memory to a card for a while (bytes/s), such as while other cards copy, too."""
    there = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    near = torch.empty(size, dtype=torch.uint8, device=device)
    began, moved = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        near.copy_(there)
        moved += size
    return moved / (time.perf_counter() - began)


def host_memory_speed(size: int = _BYTES) -> float:
    """Speed of copies within the machine's memory by all threads of torch, reads plus writes (bytes/s)."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    return 2 * size / _seconds(lambda: target.copy_(source), "cpu")


def _seconds(copy: Callable[[], object], device: str) -> float:
    """Median time of a copy (s)."""
    taken = []
    for _ in range(_REPEATS + 1):  # the first one is not counted
        began = time.perf_counter()
        copy()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
