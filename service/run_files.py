"""Directories of runs on disk: how large they are, and how they are removed. Links are never followed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_ASIDE = ".removed-"


def size_of(home: Path) -> int:
    """Bytes of all files below a directory; 0 where there is none."""
    if not home.is_dir():
        return 0
    total = 0
    for _, _, names, folder in os.fwalk(home):
        for name in names:
            with contextlib.suppress(FileNotFoundError):    # a checkpoint that was replaced meanwhile
                total += os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    return total


def set_aside(home: Path, run_id: str, roots: Sequence[Path]) -> Path | None:
    """Give a run's directory a name under which nothing finds it any more; `remove` does the rest.

    Args:
        home: The run's own directory.
        run_id: The run.
        roots: The output roots. They may have changed since the run was made, and a mistake would remove what is not a run's.

    Returns:
        The new name, in the root; None: there is no directory.

    Raises:
        OSError: It cannot be renamed, is a link, or is not the run's own under one of the roots.
    """
    if not home.is_symlink() and not home.exists():
        return None
    parent = home.parent.resolve()
    root = next((root for root in roots if parent.is_relative_to(root)), None)
    if root is None or home.is_symlink() or home.name != run_id:
        raise PermissionError(errno.EPERM, f"not the directory of run {run_id} under an output root", str(home))
    return (parent / home.name).rename(root / f"{_ASIDE}{run_id}")


def remove(path: Path) -> None:
    """Remove a directory with all that is in it; links in it are removed, not what they point to.

    Raises:
        OSError: A part of it cannot be removed.
    """
    shutil.rmtree(path)


def left_aside(roots: Iterable[Path]) -> Iterator[Path]:
    """Directories that were set aside and not removed, because the service ended in between."""
    for root in roots:
        yield from (path for path in root.glob(f"{_ASIDE}*") if path.is_dir() and not path.is_symlink())
