"""The service's own secret, which drivers' tokens are derived from."""

from __future__ import annotations

import secrets
from pathlib import Path

from moedisco_ray.core.secret_file import kept_secret

BYTES = 32


def service_secret(state_dir: Path) -> bytes:
    """The secret in STATE_DIR/secret, made where there is none; only the service's user can read it.

    Raises:
        OSError: It can be neither read nor made.
    """
    return kept_secret(state_dir / "secret", lambda: secrets.token_bytes(BYTES))
