"""Unpacks a tar archive as it arrives, and only what a model is made of: directories and plain files in one top directory."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from service.client.errors import DownloadError

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_EXTENSION = 2**20
_MOST_DIGITS = 18
_PAX, _PAX_GLOBAL, _GNU_LONG_NAME = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME


class Unpacker:
    """Takes an archive in pieces of any size and writes its files.

    Links, devices, absolute names, `..` and names that come twice are refused before anything of theirs is written; owners,
    modes and times of the archive are not taken over.

    Args:
        directory: Takes the place of the archive's top directory; exists.
        received: Told the bytes of files written so far, after each piece.
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
        self._extension: bytes | None = None    # type of the extended header that is being read
        self._next: dict[str, str] = {}         # what extended headers say of the next member

    def take(self, chunk: bytes) -> None:
        """Take the next piece.

        Raises:
            DownloadError: The archive is broken or holds what must not be unpacked, or the disk does not take it.
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
        """Whether the end of the archive has come."""
        return self._ended

    def close(self) -> None:
        """Close the file that is being written, if any; what there is of it stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take_content(self, file: BinaryIO, view: memoryview) -> memoryview:
        piece = view[:self._left]
        try:
            file.write(piece)
        except OSError as error:
            raise unwritable(file.name, error) from error
        self._left -= len(piece)
        self._written += len(piece)
        if not self._left:
            self.close()
        return view[len(piece):]

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
            raise DownloadError(f"the archive is broken: {error}") from error
        if member.type in {_PAX, _PAX_GLOBAL, _GNU_LONG_NAME}:
            if not 0 < member.size <= _LONGEST_EXTENSION:
                raise DownloadError(f"the archive is broken: a header of {member.size} bytes")
            self._extension = member.type
            self._wanted = -(-member.size // _BLOCK) * _BLOCK
            return
        self._begin(self._next.get("path", member.name), member)
        self._next = {}

    def _begin(self, name: str, member: tarfile.TarInfo) -> None:
        if member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE}:
            raise DownloadError(f"the archive holds {name!r}, which is neither a file nor a directory; nothing was kept")
        size = self._next.get("size", str(member.size))
        if not size.isdecimal() or len(size) > _MOST_DIGITS or (member.type == tarfile.DIRTYPE and size != "0"):
            raise DownloadError(f"the archive is broken: {name!r} has a size of {size}")
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
    """The path of a name that a service sent, with the directory in the place of its first part.

    Raises:
        DownloadError: It would be elsewhere.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name:
        raise DownloadError(f"the service sent {name!r}, which would be written outside the directory; nothing was kept")
    return directory.joinpath(*pure.parts[1:])


def unwritable(path: str, error: OSError) -> DownloadError:
    """The error for a disk that does not take what came."""
    return DownloadError(f"{path} cannot be written ({error.strerror})")


def _extended(kind: bytes, block: bytes) -> dict[str, str]:
    if kind == _GNU_LONG_NAME:
        return {"path": block.rstrip(b"\0").decode(errors="surrogateescape")}
    if kind == _PAX_GLOBAL:
        return {}  # comments and the like
    return dict(_pax_records(block))


def _pax_records(block: bytes) -> Iterator[tuple[str, str]]:
    # Each is "LENGTH KEY=VALUE\n", where the length counts itself.
    rest = block.rstrip(b"\0")
    while rest:
        digits, _, _ = rest.partition(b" ")
        if not digits.isdigit() or len(digits) > _MOST_DIGITS or not len(digits) + 1 < int(digits) <= len(rest):
            raise DownloadError("the archive is broken: an extended header cannot be read")
        key, _, value = rest[len(digits) + 1:int(digits)].removesuffix(b"\n").partition(b"=")
        yield key.decode(errors="replace"), value.decode(errors="surrogateescape")
        rest = rest[int(digits):]
