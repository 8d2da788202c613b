"""Read the pieces of several files ahead, and write pieces to a file whose checksum is counted."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TypeVar

from torch import Tensor

from moedisco_ray.core.limits import SYNC_AHEAD
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.training.sync.layout import as_bytes

T = TypeVar("T")


class Counting:
    """Writes tensors to a file, and counts its size and SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, tensor: Tensor) -> None:
        data = as_bytes(tensor)
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    @property
    def entry(self) -> Entry:
        return Entry(self._size, self._digest.hexdigest())


def ahead(calls: Iterable[Callable[[], T]], threads: ThreadPoolExecutor) -> Iterator[T]:
    """Results of calls, in order; threads make some of them ahead."""
    pending: collections.deque[Future[T]] = collections.deque()
    for call in calls:
        pending.append(threads.submit(call))
        if len(pending) > SYNC_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def range_file(kind: str, place: int) -> str:
    """Name of the file with a range, in the folder of a sync point."""
    return f"{kind}/{place:04d}.bin"
