"""Files of a run directory: opened without ever leaving it, and sent whole or in part."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from email.utils import formatdate
from pathlib import Path, PurePosixPath
from typing import BinaryIO, ClassVar, Protocol
from urllib.parse import quote

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from service import run_files
from service.api.responses import ClosedStream
from service.errors import NotFound, RangeUnsatisfiable
from service.schemas import Artifact

BLOCK = 2**20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Content(Protocol):
    """Bytes of a known length that can be sent from any position on."""

    @property
    def name(self) -> str:
        """Name under which a browser saves them."""

    @property
    def media_type(self) -> str:
        """What they are; a file of a run is only saved, so that it is bytes to the browser."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def etag(self) -> str:
        """Changes whenever the bytes do."""

    @property
    def modified(self) -> float:
        """Seconds since the epoch."""

    def stream(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `end`, a block at a time; nothing is left open afterwards."""

    def close(self) -> None:
        """Let go of them without reading."""


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """A regular file, open for reading; what it says of itself is of the moment it was opened.

    Attributes:
        name: Its last part.
        file: To read from.
        size: Bytes.
        etag: Changes whenever the file does.
        modified: Seconds since the epoch.
    """

    name: str
    file: BinaryIO
    size: int
    etag: str
    modified: float
    media_type: ClassVar[str] = "application/octet-stream"

    def stream(self, start: int, end: int) -> AsyncIterator[bytes]:
        """See `Content`."""
        return blocks(self.file, start, end)

    def close(self) -> None:
        """See `Content`."""
        self.file.close()


def open_file(directory: Path, path: str) -> OpenFile:
    """Open a file below a directory.

    Args:
        directory: The run directory.
        path: As the listing has it: with slashes, relative, without links, `..`, or parts that begin with a dot.

    Raises:
        NotFound: There is no such file, or it would lead out of the directory.
    """
    parts = path.split("/")
    if "\0" in path or any(part in ("", "..") or part.startswith(".") for part in parts):
        raise _absent(path)
    try:
        file = run_files.open_regular(directory, path)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise _absent(path) from error
    found = os.fstat(file.fileno())
    etag = f'"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"'
    return OpenFile(parts[-1], file, found.st_size, etag, found.st_mtime)


def list_files(directory: Path) -> Iterator[Artifact]:
    """The files below a directory, by path; drafts, links and what begins with a dot are left out."""
    for folder, folders, names, number in run_files.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            try:
                found = os.stat(name, dir_fd=number, follow_symlinks=False)
            except OSError:     # a stage has just replaced its draft
                continue
            if stat.S_ISREG(found.st_mode) and not name.startswith(".") and name.isprintable():
                path = str(PurePosixPath(folder, name))
                yield Artifact(path=path, bytes=found.st_size, updated=found.st_mtime)


def send_content(request: Request, found: Content) -> Response:
    """The answer that brings a file or an archive, or the part of it that was asked for.

    Raises:
        RangeUnsatisfiable: The part is not there.
    """
    headers = {
        "Accept-Ranges": "bytes", "ETag": found.etag, "Last-Modified": formatdate(found.modified, usegmt=True),
        "Cache-Control": "private, no-cache", **attachment(found.name)}
    if _known(request.headers, found.etag):
        found.close()
        return Response(status_code=304, headers=headers)
    try:
        part = _part(request.headers, found)
    except RangeUnsatisfiable:
        found.close()
        raise
    start, end = part or (0, found.size)
    headers["Content-Length"] = str(end - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.size}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        found.close()
        return Response(status_code=status, headers=headers, media_type=found.media_type)
    return ClosedStream(found.stream(start, end), status, headers, found.media_type)


async def blocks(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    """The bytes of a file from `start` up to `end`, a block at a time; closes it."""
    with file:
        while start < end:
            block = await run_in_threadpool(os.pread, file.fileno(), min(BLOCK, end - start), start)
            if not block:
                raise EOFError(f"a file ended {end - start} bytes early")
            start += len(block)
            yield block


def attachment(name: str) -> Mapping[str, str]:
    """Headers that make a browser save a file instead of showing it as a page of ours."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return {"Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"}


def _known(headers: Mapping[str, str], etag: str) -> bool:
    known = headers.get("if-none-match")
    return known is not None and (known.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in known.split(",")))


def _part(headers: Mapping[str, str], found: Content) -> tuple[int, int] | None:
    """The first byte and the one after the last; None: all. Several ranges at once, or none that is valid, count as all."""
    asked = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    condition = headers.get("if-range")
    if asked is None or asked.groups() == ("", "") or (condition is not None and condition.strip() != found.etag):
        return None
    first, last = asked.groups()
    if not first:
        start, end = max(0, found.size - int(last)), found.size
        if not int(last):
            raise RangeUnsatisfiable(found.size)
    else:
        start = int(first)
        end = min(found.size, int(last) + 1) if last else found.size
        if last and int(last) < start:
            return None
    if start >= found.size:
        raise RangeUnsatisfiable(found.size)
    return start, end


def _absent(path: str) -> NotFound:
    return NotFound(f"the run has no file {path!r}; GET .../artifacts lists them")
