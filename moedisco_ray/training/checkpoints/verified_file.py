"""A file of a checkpoint that is verified block by block as it is read."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.training.checkpoints.manifest import Checksum


class VerifiedFile(io.RawIOBase):
    """A readable file without buffer, which keeps two verified blocks in memory.

    torch reads a tensor at its begin, then at its end, then from its begin on. So of the blocks in memory, the first
    one in the file makes room for the next.

    Args:
        checksum: Checksum of the file.
        block: Returns the verified bytes of a block.
    """

    def __init__(self, checksum: Checksum, block: Callable[[int], bytes]) -> None:
        self._checksum = checksum
        self._read_block = block
        self._blocks: dict[int, bytes] = {}
        self._position = 0
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        """Position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._checksum.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at most as many bytes as fit into a buffer, up to the end of a block, and return their number.

        Raises:
            StorageError: The block is damaged, or the storage does not respond; so in every later call.
        """
        if self._position >= self._checksum.size:
            return 0
        index, start = divmod(self._position, self._checksum.block_bytes)
        view = memoryview(buffer).cast("B")
        part = memoryview(self._block(index))[start : start + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def check(self) -> None:
        """Raise the first error of a read again: torch, which reads in C++, may have raised another in its place."""
        if self._error is not None:
            raise self._error

    def _block(self, index: int) -> bytes:
        self.check()
        if index not in self._blocks:
            try:
                data = self._read_block(index)
            except (MoeDiscoError, OSError) as error:
                self._error = error
                raise
            if len(self._blocks) == 2:  # see the docstring of the class
                del self._blocks[min(self._blocks)]
            self._blocks[index] = data
        return self._blocks[index]
