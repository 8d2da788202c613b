"""Confines the files that this process opens for a configuration to directories that an operator allows.

The control service checks the paths of a configuration when it is submitted. Files and symbolic links may change afterwards, so the
opened file is checked again: `opened` opens a path, asks the kernel which file that is, and yields a path to exactly this file.
Without roots, as on a user's own machine, everything may be read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from moedisco_ray.core.locations import Location, local_copies

ENVIRONMENT = "MOEDISCO_READ_ROOTS"
"""Environment variable: JSON list of the directories that may be read. The URI of a run, or of a part of one, stands for its copy.

The control service sets the variable for a driver, and Ray passes it to the driver's workers.
"""

_WITHIN: ContextVar[tuple[str, ...] | None] = ContextVar("read_roots", default=None)
_OPENED = Path("/proc/self/fd")


@contextlib.contextmanager
def reading_within(roots: Sequence[Location]) -> Iterator[None]:
    """Confine reading to some directories until the block ends, in this thread or task only."""
    token = _WITHIN.set(tuple(map(str, roots)))
    try:
        yield
    finally:
        _WITHIN.reset(token)


def read_roots() -> tuple[Path, ...] | None:
    """The directories that may be read, with symbolic links resolved; None if everything may be read."""
    within = _WITHIN.get()
    if within is None:
        named = os.environ.get(ENVIRONMENT)
        if named is None:
            return None
        within = tuple(json.loads(named))
    return tuple(Path(os.path.realpath(copy)) for root in within for copy in local_copies(root))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Open a file inside the read roots, and yield a path to exactly this file, even if it is renamed or replaced meanwhile.

    The path is valid until the block ends; a file that was opened through it stays readable.

    Raises:
        OSError: The file cannot be opened, or is outside of the read roots.
    """
    roots = read_roots()
    if roots is None:
        yield path
        return
    check_inside(path)      # check before opening, because opening a device may have side effects
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = _OPENED / str(descriptor)
        real = Path(found.readlink() if _OPENED.is_dir() else os.path.realpath(path))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not _inside(real, roots):
            raise _outside(path)
        yield found if _OPENED.is_dir() else real
    finally:
        os.close(descriptor)


def check_inside(path: Path) -> None:
    """Refuse a path that currently leads out of the read roots.

    Raises:
        OSError: The path leads out of the read roots.
    """
    roots = read_roots()
    if roots is not None and not _inside(Path(os.path.realpath(path)), roots):
        raise _outside(path)


def check_folder(directory: Path) -> None:
    """Refuse a folder if it, or a symbolic link directly in it, leads out of the read roots; subfolders are not checked.

    Raises:
        OSError: The folder or a link leads out of the read roots, or the folder cannot be listed.
    """
    if read_roots() is None:
        return
    check_inside(directory)
    for path in sorted(directory.iterdir()):
        check_inside(path)


def _inside(real: Path, roots: Sequence[Path]) -> bool:
    return any(real.is_relative_to(root) for root in roots)


def _outside(path: Path) -> OSError:
    return PermissionError(errno.EACCES, "leads out of the directories that may be read; name a file inside them", str(path))
