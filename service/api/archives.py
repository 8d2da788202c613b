"""A directory as a tar archive, made while it is sent: no temporary file, no file whole in memory, and its size known before."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from service.api.files import blocks, list_files, open_file
from service.api.responses import none_yet
from service.schemas import Artifact

_RECORD = 512
_END = bytes(2 * _RECORD)


class Archive:
    """What a tar archive of a committed directory will hold.

    Args:
        directory: What to pack; committed, so that nothing in it changes.
        prefix: The directory's name in the archive.

    Raises:
        NotFound: It is not there.
    """

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory = directory
        self._members = [(file, _header(file, prefix)) for file in list_files(directory)]
        if not self._members:
            raise none_yet(f"{directory.name} directory")

    @property
    def size(self) -> int:
        """Bytes of the whole archive."""
        return sum(len(header) + file.bytes + _padding(file.bytes) for file, header in self._members) + len(_END)

    async def stream(self) -> AsyncIterator[bytes]:
        """The archive, piece by piece.

        Raises:
            EOFError: A file became shorter; the answer is cut off, so that its reader notices.
        """
        for file, header in self._members:
            yield header
            found = await run_in_threadpool(open_file, self._directory, file.path)
            async for block in blocks(found.file, 0, file.bytes):
                yield block
            yield bytes(_padding(file.bytes))
        yield _END


def _header(file: Artifact, prefix: str) -> bytes:
    info = tarfile.TarInfo(f"{prefix}/{file.path}")
    info.size, info.mtime, info.mode = file.bytes, int(file.updated), 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> int:
    return -size % _RECORD
