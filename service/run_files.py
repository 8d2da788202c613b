"""Files and directories of runs on disk: opened, read, measured and removed, never through a link, which drivers may make."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from service.errors import NotFound

MOST_BYTES = 256 * 2**20
"""Of a file that is read whole."""
MOST_LEVELS = 64
"""Folders in one another that are looked into; a run has a handful."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO)


def open_folder(directory: Path, path: str = "") -> int:
    """Open a directory, or a folder below it; no step is a link, nor is the directory itself.

    Args:
        directory: The run directory.
        path: With slashes, relative; empty: the directory.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        FileNotFoundError: There is no such folder.
        OSError: It cannot be opened.
    """
    with _absence(directory / path):
        # Each step is opened from the one before, so that nothing can be exchanged under way.
        step = os.open(directory, FOLDER)
        for part in _parts(path):
            try:
                following = os.open(part, FOLDER, dir_fd=step)
            finally:
                os.close(step)
            step = following
        return step


def open_regular(directory: Path, path: str) -> BinaryIO:
    """Open a regular file below a directory for reading, unbuffered; no step is a link.

    Args:
        directory: The run directory.
        path: With slashes, relative.

    Raises:
        FileNotFoundError: There is no such file, or it is a link, a pipe, a device or a folder.
        OSError: It cannot be opened.
    """
    folder, _, name = path.rpartition("/")
    (name,) = _parts(name) or [""]
    step = open_folder(directory, folder)
    try:
        with _absence(directory / path):
            # A pipe without a writer would keep its reader for ever.
            number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=step)
    finally:
        os.close(step)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _absent(directory / path)
    return os.fdopen(number, "rb", buffering=0)


def read(directory: Path, path: str, most: int = MOST_BYTES) -> bytes | None:
    """A file below a directory, whole; None: `open_regular` finds none.

    Raises:
        NotFound: It is too large to be read whole.
        OSError: It cannot be read.
    """
    try:
        file = open_regular(directory, path)
    except FileNotFoundError:
        return None
    content = bytearray()
    with file:
        while len(content) <= most and (block := file.read(min(2**20, most + 1 - len(content)))):
            content += block
    if len(content) > most:
        raise NotFound(f"{path} is larger than {most >> 20} MiB, so that it is not shown; it can be downloaded")
    return bytes(content)


def walk(directory: Path) -> Iterator[tuple[str, list[str], list[str], int]]:
    """The folders of a directory, as `os.fwalk` yields them, by their paths in it; none where there is no directory."""
    try:
        start = open_folder(directory)
    except FileNotFoundError:
        return
    try:
        for folder, folders, names, number in os.fwalk(".", dir_fd=start):
            if folder.count("/") >= MOST_LEVELS:
                folders.clear()
            yield folder.removeprefix(".").removeprefix("/"), folders, names, number
    finally:
        os.close(start)


def size_of(home: Path) -> int:
    """Bytes of all files below a directory; 0 where there is none."""
    total = 0
    for _, _, names, folder in walk(home):
        for name in names:
            with contextlib.suppress(FileNotFoundError):    # a checkpoint that was replaced meanwhile
                total += os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    return total


def remove(path: Path) -> None:
    """Remove a directory with all that is in it; links in it are removed, not what they point to.

    Raises:
        OSError: A part of it cannot be removed.
    """
    try:
        shutil.rmtree(path)
    except RecursionError as error:
        raise OSError(errno.ENAMETOOLONG, "its folders are too deep in one another; remove it by hand", str(path)) from error


def _parts(path: str) -> list[str]:
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") for part in parts):
        raise _absent(Path(path))
    return parts


@contextlib.contextmanager
def _absence(path: Path) -> Iterator[None]:
    """What is no file or folder of its own counts as absent."""
    try:
        yield
    except OSError as error:
        if error.errno in _ABSENT:
            raise _absent(path) from error
        raise


def _absent(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
