"""Opens and sends files of a run; no path leads out of the run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Mapping
from email.utils import formatdate
from typing import ClassVar, Protocol
from urllib.parse import quote

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from service.api.responses import ClosedStream
from service.errors import NotFound, RangeUnsatisfiable
from service.run_storage import RunStorage, StoredFile

BLOCK = 2**20
_ABSENT = "the run has no file {}; GET .../artifacts lists them"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Content(Protocol):
    """A file or an archive to send: bytes of known length, readable from any position."""

    @property
    def name(self) -> str:
        """File name for the browser."""

    @property
    def media_type(self) -> str:
        """Media type; `application/octet-stream` for files of a run, so that browsers save them."""

    @property
    def size(self) -> int:
        """Size (bytes)."""

    @property
    def etag(self) -> str:
        """ETag, which changes with the content."""

    @property
    def modified(self) -> float:
        """Time of the last change, in seconds since the epoch."""

    def stream(self, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes from `start` up to `end`, in blocks; closes the content afterwards."""

    def close(self) -> None:
        """Close the content without reading it."""


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """An open file of a run, with its attributes at the time of opening.

    Attributes:
        name: File name without the folder.
    """

    name: str
    file: StoredFile
    size: int
    etag: str
    modified: float
    media_type: ClassVar[str] = "application/octet-stream"

    def stream(self, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of the file from `start` up to `end`, in blocks; closes the file afterwards."""
        return blocks(self.file, start, end)

    def close(self) -> None:
        """Close the file without reading it."""
        self.file.close()


def open_file(storage: RunStorage, path: str, absent: str = _ABSENT) -> OpenFile:
    """Open a file of a run by its path below the run directory.

    Args:
        storage: The files.
        path: Path of the file.
        absent: Message with a place for the path, if it does not exist.

    Raises:
        NotFound: The file does not exist, or the path contains a symbolic link, `..` or a part that begins with a dot.
    """
    parts = path.split("/")
    if "\0" in path or any(part in ("", "..") or part.startswith(".") for part in parts):
        raise NotFound(absent.format(repr(path)))
    try:
        file = storage.open(path)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise NotFound(absent.format(repr(path))) from error
    return OpenFile(parts[-1], file, file.size, file.etag, file.modified)


def send_content(request: Request, found: Content) -> Response:
    """Response with the content, or with the range of it that the request asks for.

    Raises:
        RangeUnsatisfiable: The range is outside of the content.
    """
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": found.etag,
        "Last-Modified": formatdate(found.modified, usegmt=True),
        "Cache-Control": "private, no-cache",
        **attachment(found.name),
    }
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


async def blocks(file: StoredFile, start: int, end: int) -> AsyncIterator[bytes]:
    """Bytes of a file from `start` up to `end`, in blocks; closes the file afterwards."""
    with contextlib.closing(file):
        while start < end:
            block = await run_in_threadpool(file.read_at, start, min(BLOCK, end - start))
            if not block:
                raise EOFError(f"a file ended {end - start} bytes early")
            start += len(block)
            yield block


def attachment(name: str) -> Mapping[str, str]:
    """Headers that make a browser save a file instead of showing it as a page of the service."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return {"Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"}


def _known(headers: Mapping[str, str], etag: str) -> bool:
    known = headers.get("if-none-match")
    return known is not None and (
        known.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in known.split(","))
    )


def _part(headers: Mapping[str, str], found: Content) -> tuple[int, int] | None:
    """Start and end of the requested range; None if the header names no single, valid range, so that all is sent."""
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
