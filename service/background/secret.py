"""The service's own secret, which drivers' tokens are derived from."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

BYTES = 32


def service_secret(state_dir: Path) -> bytes:
    """The secret in STATE_DIR/secret, made where there is none; only the service's user can read it.

    Of several processes that make it at once, one prevails.

    Raises:
        OSError: It can be neither read nor made.
    """
    path = state_dir / "secret"
    if not path.exists():
        _make(path)
    return path.read_bytes()


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A file of `mkstemp` has mode 0600; linked when it is complete, it is never seen half-written.
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".secret.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        Path(draft).unlink()
