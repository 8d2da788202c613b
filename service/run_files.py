"""Opens, measures and removes files of runs without following symbolic links, which drivers could plant."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MOST_LEVELS = 64
"""Maximum depth of folders that `walk` enters; a run has only a few levels."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO)


def open_folder(directory: Path, path: str = "") -> int:
    """Open a directory, or the folder `path` below it, without following symbolic links; the caller closes it.

    Raises:
        FileNotFoundError: The folder does not exist, or the path leads through a symbolic link.
        OSError: The folder cannot be opened.
    """
    with _absence(directory / path):
        # Each part is opened relative to its parent, so that no part can be replaced by a link in between.
        step = os.open(directory, FOLDER)
        for part in _parts(path):
            try:
                following = os.open(part, FOLDER, dir_fd=step)
            finally:
                os.close(step)
            step = following
        return step


def open_regular(directory: Path, path: str) -> BinaryIO:
    """Open a regular file below a directory for unbuffered reading, without following symbolic links.

    Raises:
        FileNotFoundError: The file does not exist, or it is a symbolic link, a pipe, a device or a folder.
        OSError: The file cannot be opened.
    """
    folder, _, name = path.rpartition("/")
    (name,) = _parts(name) or [""]
    step = open_folder(directory, folder)
    try:
        with _absence(directory / path):
            # O_NONBLOCK: opening a pipe without a writer would block forever.
            number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=step)
    finally:
        os.close(step)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _absent(directory / path)
    return os.fdopen(number, "rb", buffering=0)


def walk(directory: Path, path: str = "") -> Iterator[tuple[str, list[str], list[str], int]]:
    """Walk a directory, or the folder `path` below it, like `os.fwalk` with relative paths.

    Yields nothing if the directory does not exist.
    """
    try:
        start = open_folder(directory, path)
    except FileNotFoundError:
        return
    try:
        for folder, folders, names, number in os.fwalk(".", dir_fd=start):
            if folder.count("/") >= MOST_LEVELS:
                folders.clear()
            yield folder.removeprefix(".").removeprefix("/"), folders, names, number
    finally:
        os.close(start)


class Linked(NamedTuple):
    """A file with several names: its folder, the numbers of disk and file, and its size (bytes)."""

    folder: str
    disk: int
    number: int
    bytes: int


def size_of(home: Path) -> int:
    """Size of all files below a directory (bytes); 0 if it is absent."""
    size, linked = sizes_of(home)
    return size + sum(file.bytes for file in linked)


def sizes_of(home: Path) -> tuple[int, list[Linked]]:
    """Size of the files below a directory that have one name (bytes), and those that have several (hard links)."""
    total, linked = 0, []
    for below, _, names, folder in walk(home):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # the file was just removed, such as an old checkpoint
                state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if state.st_nlink > 1 and stat.S_ISREG(state.st_mode):
                    linked.append(Linked(below, state.st_dev, state.st_ino, state.st_size))
                else:
                    total += state.st_size
    return total, linked


def remove(path: Path) -> None:
    """Remove a directory and its content; of symbolic links only the link is removed, not the target.

    Raises:
        OSError: A part of the directory cannot be removed.
    """
    try:
        shutil.rmtree(path)
    except RecursionError as error:
        raise OSError(errno.ENAMETOOLONG, "its folders are nested too deeply; remove it by hand", str(path)) from error


def _parts(path: str) -> list[str]:
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") for part in parts):
        raise _absent(Path(path))
    return parts


@contextlib.contextmanager
def _absence(path: Path) -> Iterator[None]:
    """Turn errors about symbolic links, pipes and other special files into FileNotFoundError."""
    try:
        yield
    except OSError as error:
        if error.errno in _ABSENT:
            raise _absent(path) from error
        raise


def _absent(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
