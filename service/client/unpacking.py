"""Unpacks a tar archive while it arrives. Only directories and plain files in one top directory are accepted."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from service.client.errors import DownloadError

_BLOCK = tarfile.BLOCKSIZE
_EXTENSION_BYTES = 2**20
"""Maximum size of an extended header (bytes): it contains only names, so a larger one means damage."""
_DIGITS = 18
"""Maximum number of digits of a size or length in a header, so that a damaged number is not parsed."""
_PAX, _PAX_GLOBAL, _GNU_LONG_NAME = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME


class Unpacker:
    """Writes the files of an archive that arrives in pieces of any size.

    Links, devices, absolute names, `..` and repeated names are refused before any of their bytes is written. Owners,
    modes and times in the archive are ignored.

    Args:
        directory: Existing directory that replaces the archive's top directory.
        received: Called after each piece with the bytes of files written so far.
    """

    def __init__(self, directory: Path, received: Callable[[int], None] = lambda _: None) -> None:
        self._directory = directory
        self._received = received
        self._written = 0
        self._ended = False
        self._header = bytearray()
        self._wanted = _BLOCK
        self._file: BinaryIO | None = None
        self._left = 0
        self._padding = 0
        self._extension: bytes | None = None  # type flag of the extended header that is being read
        self._next: dict[str, str] = {}  # what extended headers set for the next file

    def take(self, chunk: bytes) -> None:
        """Unpack the next piece of the archive.

        Raises:
            DownloadError: The archive is damaged or unsafe, or a file cannot be written.
        """
        view = memoryview(chunk)
        while view and not self._ended:
            if self._file is not None:
                view = self._take_content(self._file, view)
            elif self._padding:
                passed = min(self._padding, len(view))
                self._padding -= passed
                view = view[passed:]
            else:
                missing = self._wanted - len(self._header)
                self._header += view[:missing]
                view = view[missing:]
                if len(self._header) == self._wanted:
                    self._take_header()
        self._received(self._written)

    @property
    def complete(self) -> bool:
        """Whether the end of the archive was reached."""
        return self._ended

    def close(self) -> None:
        """Close the file that is being written, if any, and keep what was written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take_content(self, file: BinaryIO, view: memoryview) -> memoryview:
        piece = view[: self._left]
        try:
            file.write(piece)
        except OSError as error:
            raise unwritable(file.name, error) from error
        self._left -= len(piece)
        self._written += len(piece)
        if not self._left:
            self.close()
        return view[len(piece) :]

    def _take_header(self) -> None:
        block, self._header, self._wanted = bytes(self._header), bytearray(), _BLOCK
        if self._extension is not None:
            self._next |= _extended(self._extension, block)
            self._extension = None
            return
        if not any(block):
            self._ended = True
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, UnicodeError) as error:
            raise DownloadError(f"the archive is damaged: {error}") from error
        if member.type in {_PAX, _PAX_GLOBAL, _GNU_LONG_NAME}:
            if not 0 < member.size <= _EXTENSION_BYTES:
                raise DownloadError(f"the archive is damaged: a header of {member.size} bytes")
            self._extension = member.type
            self._wanted = -(-member.size // _BLOCK) * _BLOCK
            return
        self._begin(self._next.get("path", member.name), member)
        self._next = {}

    def _begin(self, name: str, member: tarfile.TarInfo) -> None:
        if member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE}:
            raise DownloadError(
                f"the archive contains {name!r}, which is neither a file nor a directory; nothing was kept"
            )
        size = self._next.get("size", str(member.size))
        if not size.isdecimal() or len(size) > _DIGITS or (member.type == tarfile.DIRTYPE and size != "0"):
            raise DownloadError(f"the archive is damaged: {name!r} has a size of {size}")
        path = below(self._directory, name)
        try:
            if member.type == tarfile.DIRTYPE:
                path.mkdir(parents=True, exist_ok=True)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        except OSError as error:
            raise unwritable(str(path), error) from error
        self._left = int(size)
        self._padding = -self._left % _BLOCK
        if not self._left:
            self.close()


def below(directory: Path, name: str) -> Path:
    """Path of a downloaded file: `directory` takes the place of the first part of the file's name in the archive.

    Raises:
        DownloadError: The path would be outside the directory.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name:
        raise DownloadError(f"the service sent {name!r}, which is outside the directory; nothing was kept")
    return directory.joinpath(*pure.parts[1:])


def unwritable(path: str, error: OSError) -> DownloadError:
    """The error for a file that cannot be written."""
    return DownloadError(f"{path} cannot be written ({error.strerror})")


def _extended(kind: bytes, block: bytes) -> dict[str, str]:
    if kind == _GNU_LONG_NAME:
        return {"path": block.rstrip(b"\0").decode(errors="surrogateescape")}
    if kind == _PAX_GLOBAL:
        return {}  # comments and the like
    return dict(_pax_records(block))


def _pax_records(block: bytes) -> Iterator[tuple[str, str]]:
    # Each record is "LENGTH KEY=VALUE\n", where the length includes its own digits.
    rest = block.rstrip(b"\0")
    while rest:
        digits, _, _ = rest.partition(b" ")
        if not digits.isdigit() or len(digits) > _DIGITS or not len(digits) + 1 < int(digits) <= len(rest):
            raise DownloadError("the archive is damaged: an extended header is not readable")
        key, _, value = rest[len(digits) + 1 : int(digits)].removesuffix(b"\n").partition(b"=")
        yield key.decode(errors="replace"), value.decode(errors="surrogateescape")
        rest = rest[int(digits) :]
