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


def _make(path: Path, secret: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # `mkstemp` makes files of mode 0600, whatever the umask.
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        # Publish the draft by a hard link: no reader sees a partial file, and linking fails if another process was
        # first.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        Path(draft).unlink()
