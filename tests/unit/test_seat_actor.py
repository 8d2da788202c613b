"""What a seat's process does between two pieces of work; a stand-in for torch keeps a made-up GPU's memory."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moedisco_ray.execution.ray import seat_actor
from moedisco_ray.execution.ray.seat_actor import Seat, clear


class Cycle:
    """An object that refers to itself, as a model and its gradients do."""

    def __init__(self) -> None:
        self.me = self


@dataclasses.dataclass
class Cuda:
    """As much of `torch.cuda` as a seat needs.

    Attributes:
        used: Bytes that some tensor holds on each of two cards.
        cached: Bytes that torch keeps for later tensors.
        broken: Whether a kernel has failed that nothing has waited for yet.
    """

    used: tuple[int, int] = (0, 0)
    cached: int = 0
    broken: bool = False
    initialized: bool = True
    compiled: int = 8

    @property
    def modules(self) -> dict[str, Any]:
        return {"torch": self, "torch._dynamo": self}

    @property
    def cuda(self) -> Cuda:
        return self

    @property
    def compiler(self) -> Cuda:
        return self

    def reset(self) -> None:
        self.compiled = 0

    def is_initialized(self) -> bool:
        return self.initialized

    def device_count(self) -> int:
        return len(self.used)

    def memory_reserved(self, card: int) -> int:
        return self.used[card]

    def current_device(self) -> int:
        return 0

    def synchronize(self, card: int) -> None:
        assert card in (0, 1)
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache(self) -> None:
        self.cached = 0

    def reset_peak_memory_stats(self, card: int) -> None:
        assert card in (0, 1)

    def memory_allocated(self, card: int) -> int:
        return self.used[card]


@pytest.fixture
def seat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seat]:
    monkeypatch.setattr(seat_actor.ray, "get_gpu_ids", lambda: [0])
    monkeypatch.setattr(seat_actor.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    yield Seat()
    gc.unfreeze()


def test_memory_and_compiled_code_do_not_outlive_the_work() -> None:
    gpu, left = Cuda(used=(0, 5), cached=7), Cycle()
    gone = weakref.ref(left)
    del left
    assert clear(gpu.modules) == 5
    assert (gpu.cached, gpu.compiled, gone()) == (0, 0, None)


def test_what_the_first_work_imports_is_not_searched_for_garbage_again(seat: Seat) -> None:
    seat.run(lambda: None)
    frozen = gc.get_freeze_count()
    assert frozen > 1000
    gone: list[weakref.ref[Cycle]] = []
    seat.run(lambda: gone.append(weakref.ref(Cycle())))
    assert gone[0]() is None
    assert gc.get_freeze_count() <= frozen  # what later work leaves alive can still become garbage


@pytest.mark.slow
def test_a_process_that_used_no_gpu_makes_no_context_on_it() -> None:
    gpu = Cuda(used=(0, 5), cached=7, broken=True, initialized=False)
    assert clear(gpu.modules) == clear({}) == 0
    assert gpu.cached == 7


def test_an_error_that_breaks_the_gpu_s_context_fails_the_work_that_made_it(
    seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Cuda()
    monkeypatch.setattr(seat_actor, "sys", gpu)

    def breaks() -> str:
        gpu.broken = True
        return "it seems to have worked"

    assert seat.run(lambda: "well") == "well"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        seat.run(breaks)


class Placed:
    """Where Ray has put the seat."""

    def get_gpu_ids(self) -> list[int]:
        return [0]

    def get_runtime_context(self) -> Placed:
        return self

    def get_node_id(self) -> str:
        return "node"


def test_memory_that_stays_ends_the_seat_before_its_next_work(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Cuda()
    monkeypatch.setattr(seat_actor, "sys", gpu)

    def leaks(size: int) -> None:
        gpu.used = (size, 0)

    monkeypatch.setattr(seat_actor, "ray", Placed())
    seat.run(lambda: leaks(1 << 20))
    assert seat.place() == ("node", "0")
    seat.run(lambda: leaks(1 << 30))
    with pytest.raises(RuntimeError, match=f"{1 << 30} bytes"):
        seat.place()


def test_a_seat_imports_neither_torch_nor_the_package_s_heavy_parts() -> None:
    script = (
        "import sys, moedisco_ray.execution.ray.seat_actor\n"
        "print(sorted({'torch', 'numpy', 'ray.train'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
