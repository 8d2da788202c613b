"""A file of a checkpoint that is verified block by block as it is read."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

from moedisco_ray.training.checkpoints.manifest import Checksum

_KEPT_BLOCKS = 2
"""Number of verified blocks in memory. Tensors are read in the order in which they were written, and one may begin in the block
in which the one before ends."""


class VerifiedFile(io.RawIOBase):
    """A readable file without buffer.

    Args:
        checksum: Checksum of the file.
        block: Returns the verified bytes of a block.
    """

    def __init__(self, checksum: Checksum, block: Callable[[int], bytes]) -> None:
        self._checksum = checksum
        self._block = functools.lru_cache(_KEPT_BLOCKS)(block)
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._checksum.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at most as many bytes as fit into a buffer, up to the end of a block, and return their number."""
        if self._position >= self._checksum.size:
            return 0
        index, start = divmod(self._position, self._checksum.block_bytes)
        view = memoryview(buffer).cast("B")
        part = memoryview(self._block(index))[start:start + len(view)]
        view[:len(part)] = part
        self._position += len(part)
        return len(part)
