"""Read a file in bounded pieces and decode it as UTF-8; errors explain how to fix or skip the file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import NamedTuple

from moedisco_ray.stages.corpus.files import File

CHUNK = 1 << 20
"""Size of one read (bytes)."""
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class NotTextError(ValueError):
    """A file is not UTF-8 text.

    The message continues a sentence that begins with the file's name: "is binary, not text ...".
    """


class LinePart(NamedTuple):
    """A line of a file, or part of a long one.

    Attributes:
        at: Offset of the first byte in the (decompressed) file.
        data: At most `CHUNK` bytes, with the line end.
        ends: Whether this is the last part of the line.
    """

    at: int
    data: bytes
    ends: bool


def read_chunks(file: File) -> Iterator[tuple[int, bytes]]:
    """Yield the (decompressed) file in pieces of at most `CHUNK` bytes with offsets, without a byte order mark.

    Raises:
        NotTextError: The file begins with a UTF-16 byte order mark.
        OSError: The file cannot be read.
    """
    with _open(file, whole=True) as stream:
        at = 0
        while data := stream.read(CHUNK):
            start = _after_mark(data) if at == 0 else 0
            if data[start:]:
                yield at + start, data[start:]
            at += len(data)


def read_lines(file: File, start: int = 0, stop: int | None = None) -> Iterator[LinePart]:
    """Yield the lines that begin in bytes [start, stop) of a file; the last may end later.

    A byte order mark is left out.

    Raises:
        NotTextError: The file begins with a UTF-16 byte order mark.
        OSError: The file cannot be read.
    """
    with _open(file, whole=start == 0 and stop is None) as stream:
        at = start
        if at:
            # Skip the rest of a line that began before `start`: the previous slice yields it.
            at -= 1
            stream.seek(at)
            ends = False
            while not ends and (data := stream.readline(CHUNK)):
                at += len(data)
                ends = data.endswith(b"\n")
        ends = True
        while not ends or stop is None or at < stop:
            data = stream.readline(CHUNK)
            if not data:
                return
            ends = data.endswith(b"\n")
            mark = _after_mark(data) if at == 0 else 0
            yield LinePart(at + mark, data[mark:], ends)
            at += len(data)


def decode(data: bytes, at: int) -> str:
    """Decode bytes as UTF-8, and convert CRLF line ends to LF.

    Args:
        data: Bytes that begin and end between characters.
        at: Offset of the first byte in the file, for the positions in errors.

    Raises:
        NotTextError: The bytes are binary, or in another encoding.
    """
    zero = data.find(b"\0")
    if zero >= 0:
        window = data[max(0, zero - 32) : zero + 32]
        # In UTF-16, about every second byte of most scripts is zero.
        if len(window) >= 16 and 1 / 3 < window.count(b"\0") / len(window) < 2 / 3:
            raise NotTextError(f"looks like UTF-16 (byte {at + zero} is zero); {_convert('UTF-16')}")
        raise NotTextError(f"is binary, not text (byte {at + zero} is zero); {_LEAVE_OUT}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        place = at + error.start
        raise NotTextError(
            f"is not UTF-8 text (byte {place} is 0x{data[error.start]:02X}, as in Latin-1); {_convert('LATIN1')}"
        ) from error
    return text.replace("\r\n", "\n")


_LEAVE_OUT = "name the text files by a glob, leave it out by `exclude`, or set on_error: skip"


def _convert(encoding: str) -> str:
    return f"convert it (iconv -f {encoding} -t UTF-8), leave it out by `exclude`, or set on_error: skip"


def _after_mark(data: bytes) -> int:
    if data.startswith(_UTF16_MARKS):
        raise NotTextError(f"is UTF-16, not UTF-8 (by its first bytes); {_convert('UTF-16')}")
    return len(_UTF8_MARK) if data.startswith(_UTF8_MARK) else 0


def _open(file: File, *, whole: bool) -> io.BufferedReader:
    system = file.file_system()
    raw = system.open_input_stream(file.path, compression="detect") if whole else system.open_input_file(file.path)
    return io.BufferedReader(raw, CHUNK)
