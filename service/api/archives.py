"""Streams a directory as a tar archive, without temporary files and without loading whole files into memory.

The names, sizes and times of the files determine the size and the layout of the archive, so that a download can be
resumed.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import AsyncIterator
from typing import ClassVar

from starlette.concurrency import run_in_threadpool

from service.api.files import blocks, open_file
from service.api.responses import none_yet
from service.run_storage import RunStorage
from service.schemas import Artifact

_RECORD = 512
_END = bytes(2 * _RECORD)
_FORMAT = b"pax 1"
"""Version of the archive layout. It is part of the ETag; change it if the same files would give an archive of different
bytes."""


class Archive:
    """Tar archive of a folder of a run; it is sent as `service.api.files.Content`.

    Args:
        storage: Files of the run.
        folder: Folder to pack; a stage must have completed it, so that its files no longer change.
        prefix: Name of the folder in the archive.

    Raises:
        NotFound: The folder is absent or empty.
    """

    media_type: ClassVar[str] = "application/x-tar"

    def __init__(self, storage: RunStorage, folder: str, prefix: str) -> None:
        self._storage = storage
        self._members = [
            (file, _header(file, prefix + file.path.removeprefix(folder))) for file in storage.files(folder)
        ]
        if not self._members:
            raise none_yet(f"{folder} directory")
        self.name = f"{prefix}.tar"
        self.size = sum(len(header) + file.bytes + _padding(file.bytes) for file, header in self._members) + len(_END)
        self.modified = max(file.updated for file, _ in self._members)
        self.etag = _etag(self._members)

    async def stream(self, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of the archive from `start` up to `end`; files outside of this range are not opened.

        Raises:
            EOFError: A file has changed since the archive was planned. The response ends early, so that the client
                notices it.
        """
        position = 0
        for file, header in self._members:
            body = position + len(header)
            yield header[_within(start, position) : _within(end, position)]
            first, last = (min(_within(at, body), file.bytes) for at in (start, end))
            if first < last:
                found = await run_in_threadpool(open_file, self._storage, file.path)
                if (found.size, found.modified) != (file.bytes, file.updated):
                    found.close()
                    raise EOFError(f"{file.path} changed while it was sent")
                async for block in blocks(found.file, first, last):
                    yield block
            position = body + file.bytes
            padding = bytes(_padding(file.bytes))
            yield padding[_within(start, position) : _within(end, position)]
            position += len(padding)
            if position >= end:
                return
        yield _END[_within(start, position) : _within(end, position)]

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _within(position: int, start: int) -> int:
    return max(0, position - start)


def _etag(members: list[tuple[Artifact, bytes]]) -> str:
    digest = hashlib.sha256(_FORMAT)
    for file, header in members:
        digest.update(header)
        digest.update(repr(file.updated).encode())
    return f'"{digest.hexdigest()[:32]}"'


def _header(file: Artifact, name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = file.bytes, int(file.updated), 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> int:
    return -size % _RECORD
