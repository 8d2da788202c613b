"""Streams of a GPU that does not exist: a stream does its work as late, or as early, as its order allows.

What waits for too little finds tensors that are not written yet, and fails on every run instead of now and then.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moedisco_ray.training.host_copies import Copies


@dataclasses.dataclass
class LazyStream:
    """Work in its order.

    Attributes:
        is_lazy: Whether work is done only when something waits for it, or as soon as it is asked for.
        done: Number of pieces of work that are done.
    """

    is_lazy: bool
    done: int = 0
    _work: list[Callable[[], object]] = dataclasses.field(default_factory=list)

    def add(self, work: Callable[[], object]) -> None:
        self._work.append(work)
        if not self.is_lazy:
            self.run_to(len(self._work))

    def run_to(self, count: int) -> None:
        while self.done < count:
            self._work[self.done]()
            self.done += 1

    def record_event(self) -> LazyEvent:
        return LazyEvent(self, len(self._work))

    def wait_event(self, event: LazyEvent) -> None:
        self.add(event.synchronize)

    def wait_stream(self, stream: LazyStream) -> None:
        self.wait_event(stream.record_event())


@dataclasses.dataclass(frozen=True)
class LazyEvent:
    stream: LazyStream
    count: int

    def synchronize(self) -> None:
        self.stream.run_to(self.count)


class LazyCopies(Copies):
    """Copies between two tensors of a CPU, on the streams of a GPU."""

    lazy_in, lazy_out = False, True
    """Whether copies to the device, and to the host, are as late as possible."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._in: Any = LazyStream(self.lazy_in)
        self._out: Any = LazyStream(self.lazy_out)
        self._urgent: Any = LazyStream(self.lazy_in)

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor


class _CopiesOnStreams(TorchFunctionMode):
    """Hands copies inside `torch.cuda.stream` to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: LazyStream | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stream is None or function not in (Tensor.to, Tensor.copy_):
            return function(*args, **(kwargs or {}))
        source, target = (args[1], args[0]) if function is Tensor.copy_ else (args[0], torch.full_like(args[0], 7))
        self.stream.add(lambda: target.copy_(source))
        return target


@contextlib.contextmanager
def lazy_streams() -> Iterator[LazyStream]:
    """Let `LazyCopies` use streams; yields the one that computes, which does everything at once."""
    computing, mode = LazyStream(is_lazy=False), _CopiesOnStreams()

    @contextlib.contextmanager
    def on(stream: LazyStream) -> Iterator[None]:
        mode.stream = stream
        try:
            yield
        finally:
            mode.stream = None

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "current_stream", lambda _: computing)
        yield computing
