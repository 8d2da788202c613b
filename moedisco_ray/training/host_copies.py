"""Copies between the host's memory and the device that computes.

On a GPU, copies in each direction have a stream of their own and run while the GPU computes. They need host memory
whose pages cannot be moved. torch's allocator of such memory rounds sizes up to powers of two, so memory that exists
already is registered instead. On a CPU, a copy is another tensor, and is complete when the function returns.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.printable import one_line

_PIECE = 64 << 20
"""Largest number of bytes that one copy to the device moves."""


def pin(tensor: Tensor, setting: str, *, value: object, remedy: str) -> Tensor:
    """Keep the pages of a tensor in the host's memory where they are, for fast copies; return the tensor.

    Args:
        tensor: A tensor in the host's memory.
        setting: The setting that asks for fast copies.
        value: Its value.
        remedy: What to do with the setting on a machine that cannot lock the memory.

    Raises:
        ConfigError: The machine cannot lock the memory.
    """
    if tensor.numel() and not tensor.is_pinned():
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
        failed = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1)
        if int(failed):
            size, reason = f"{tensor.nbytes / 2**20:,.0f} MiB", one_line(str(runtime.cudaGetErrorString(failed)))
            remedy = (
                f"this machine cannot lock {size} of its memory ({reason}); raise its limit on locked memory "
                f"(ulimit -l), or {remedy}"
            )
            raise ConfigError(setting, value, remedy)
        weakref.finalize(tensor, runtime.cudaHostUnregister, tensor.data_ptr())
    return tensor


class Copies:
    """Copies tensors to a device and back.

    Args:
        device: The device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in = _stream(device) if device.type == "cuda" else None
        self._out = _stream(device) if device.type == "cuda" else None
        # What the device needs at once does not wait for the next layer's weights.
        self._urgent = _stream(device) if device.type == "cuda" else None
        # Ends of the copies to the host by the address that they fill: begun since the last call of `turn`, since the
        # one before, and earlier.
        self._leaving: list[dict[int, torch.cuda.Event]] = [{}, {}, {}]
        self._computed: torch.cuda.Event | None = None  # end of what was asked for before the last call of `turn`

    def pin(self, tensor: Tensor) -> Tensor:
        """Prepare a tensor in the host's memory for fast copies; return the tensor."""
        return (
            tensor if self._in is None else pin(tensor, "pools.*.memory", value="streamed", remedy="set it to resident")
        )

    def host_like(self, tensor: Tensor) -> Tensor:
        """An empty tensor in the host's memory with the shape and dtype of another one."""
        return self.pin(torch.empty(tensor.shape, dtype=tensor.dtype))

    def begin(
        self, tensors: Mapping[str, Tensor], *after: torch.cuda.Event | None, urgent: bool = False
    ) -> Callable[[], dict[str, Tensor]]:
        """Begin to copy tensors to the device; the returned function waits for the copies and returns them.

        A tensor that is still on its way to the host is copied back once it is there; of a part of it, `finish` has to
        be called before.

        Args:
            tensors: Tensors in the host's memory, by name.
            after: Ends of the copies with which other devices send them.
            urgent: Whether to copy them before what was asked for earlier.
        """
        stream = self._urgent if urgent else self._in
        if stream is None:
            copied = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            return lambda: copied
        for sent in after:
            if sent is not None:
                stream.wait_event(sent)
        for leaving, tensor in itertools.product(self._leaving, tensors.values()):
            if tensor.data_ptr() in leaving:
                stream.wait_event(leaving[tensor.data_ptr()])
        with torch.cuda.stream(stream):
            near = {name: _near(tensor.detach(), self._device) for name, tensor in tensors.items()}
            arrived = stream.record_event()

        def wait() -> dict[str, Tensor]:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arrived)
            for tensor in near.values():
                tensor.record_stream(computing)
            return near

        return wait

    def send(self, near: Tensor, far: Tensor) -> torch.cuda.Event | None:
        """Begin to copy a tensor of the device over one in the host's memory.

        Returns:
            The end of the copy; None if it has ended.
        """
        if self._out is None:
            far.copy_(near)
            return None
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            far.copy_(near, non_blocking=True)
            near.record_stream(self._out)
            ended = self._leaving[0][far.data_ptr()] = self._out.record_event()
        return ended

    def turn(self) -> None:
        """Note that the device computes with other tensors from now on."""
        since, before, earlier = self._leaving
        self._leaving = [{}, since, earlier | before]
        if self._out is not None:
            self._computed = torch.cuda.current_stream(self._device).record_event()

    def settle(self) -> None:
        """Wait until the device has computed what came before the last turn, and sent what came before the one before.

        The CPU would otherwise ask for more and more tensors, which take memory of the device until they are used.
        """
        if self._computed is not None:
            self._computed.synchronize()
        for event in self._leaving[2].values():
            event.synchronize()
        self._leaving[2] = {}

    def finish(self) -> None:
        """Wait until the device has computed everything, and sent everything to the host."""
        for _ in range(2):
            self.turn()
        self.settle()


def _near(far: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; a large one in pieces, between which copies of other streams take their turn."""
    if far.nbytes <= _PIECE:
        return far.to(device, non_blocking=True)
    near = torch.empty_like(far, device=device)
    rows = max(1, len(far) * _PIECE // far.nbytes)
    for start in range(0, len(far), rows):
        near[start : start + rows].copy_(far[start : start + rows], non_blocking=True)
    return near


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


class Ahead:
    """Takes groups of tensors to the device in their order, and copies the next group while one is used.

    Args:
        copies: Copies the tensors.
        groups: Groups of tensors in the host's memory, by name; one is asked for while the group before is used.
    """

    def __init__(self, copies: Copies, groups: Iterable[Mapping[str, Tensor]]) -> None:
        self._copies = copies
        self._groups: Iterator[Mapping[str, Tensor]] = iter(groups)
        self._next: Callable[[], dict[str, Tensor]] | None = None
        self._is_asked = False

    def take(self) -> dict[str, Tensor]:
        """The next group on the device. The caller frees a group before it takes the next one.

        Raises:
            IndexError: All groups are taken.
        """
        self.ask()
        if self._next is None:
            raise IndexError("all groups are taken")
        found, self._next, self._is_asked = self._next, None, False
        self._copies.turn()
        return found()

    def ask(self) -> None:
        """Begin to copy the next group into the memory of the group before the one that was taken; once per group.

        The CPU waits until that memory is free. The device should have work with the present group until then.
        """
        if self._is_asked:
            return
        self._copies.settle()
        group = next(self._groups, None)
        self._next = None if group is None else self._copies.begin(group)
        self._is_asked = True
