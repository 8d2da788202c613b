"""One service per state directory: its lock, its process and URL, and how to stop it.

A service holds a lock on the state directory's `service.pid` while it runs. The file's lines are the process id and,
once the service listens, its URL; they are valid only while the file is locked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moedisco_ray.core.errors import ConfigError, RunError

SECRET_FILES = ("secret", "webhook-secret")
"""Files of a state directory in which earlier versions kept the secrets of the service: of drivers, and of messages."""
_NAME = "service.pid"
_STOP_SECONDS = 90.0
"""Maximum time for a service to stop after SIGTERM, in seconds. It ends its streams and the local Ray first."""


@dataclasses.dataclass(frozen=True)
class RunningService:
    """The service that uses a state directory.

    Attributes:
        url: The service's URL; None while the service does not listen yet.
    """

    pid: int
    url: str | None


def make_private(state_dir: Path) -> None:
    """Create a state directory that only its owner can read: it holds tokens, secrets and the database."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The directory may belong to another user, such as a mounted volume's root; the files in it have private modes.
    with contextlib.suppress(PermissionError):
        state_dir.chmod(0o700)


@contextlib.contextmanager
def locked(state_dir: Path) -> Iterator[Callable[[str], None]]:
    """Hold the lock of a state directory.

    Yields:
        A function that records the service's URL once it listens.

    Raises:
        ConfigError: Another service holds the lock.
    """
    path = state_dir / _NAME
    path.touch(0o600)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "another service uses it; stop that one with `moedisco stop`, or choose another with --state-dir"
            raise ConfigError("--state-dir", str(state_dir), remedy) from error

        def write_line(text: str) -> None:
            file.write(text + "\n")
            file.flush()

        file.truncate(0)
        write_line(str(os.getpid()))
        yield write_line
        file.truncate(0)


def find(state_dir: Path) -> RunningService | None:
    """The service that uses a state directory; None if no service runs."""
    try:
        with (state_dir / _NAME).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                lines = file.read().splitlines()
                return RunningService(int(lines[0]), lines[1] if len(lines) > 1 else None) if lines else None
    except FileNotFoundError:
        pass
    return None


def stop(state_dir: Path) -> bool:
    """Stop the service that uses a state directory, as Ctrl-C does, and wait until it has ended.

    Returns:
        Whether a service ran.

    Raises:
        RunError: The service does not end.
    """
    found = find(state_dir)
    if found is None:
        return False
    os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while find(state_dir) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"the service (process {found.pid}) does not end")
        time.sleep(0.1)
    return True
