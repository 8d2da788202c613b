"""Secrets that are made once and kept in a file which only its owner can read."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def kept_secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """The secret that a file holds; if the file does not exist, make a secret and store it there with mode 0600.

    If several processes make it at the same time, all of them get the same secret.

    Args:
        path: The file; its directory is created with mode 0700 if it does not exist.
        make: Makes a new secret.

    Raises:
        OSError: The file can be neither read nor written.
    """
    if not path.exists():
        _make(path, make())
    return path.read_bytes()


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600; readers see the old content or the new one.

    Raises:
        OSError: The file cannot be written.
    """
    draft = _draft(path, data)
    try:
        draft.replace(path)
    except OSError:
        draft.unlink()
        raise


def _make(path: Path, secret: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = _draft(path, secret)
    try:
        # Publish the draft by a hard link: no reader sees a partial file, and linking fails if another process was first.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _draft(path: Path, data: bytes) -> Path:
    # `mkstemp` makes files of mode 0600, whatever the umask.
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Path(draft)
