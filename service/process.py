"""One service per state directory: who it is, where it listens, and how to end it.

The state directory's `service.pid` is locked for as long as a service lives, so that what it says can be believed
exactly then; its lines are the process id and, once the service listens, its URL.
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

_NAME = "service.pid"
_END_SECONDS = 90.0


@dataclasses.dataclass(frozen=True)
class RunningService:
    """A service that uses a state directory.

    Attributes:
        pid: Its process.
        url: Where it listens; None: not yet.
    """

    pid: int
    url: str | None


def close_to_others(state_dir: Path) -> None:
    """Make a state directory that only its owner can look into: it holds tokens, secrets and the database."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The root of a volume may belong to another user; its files are closed each by itself.
    with contextlib.suppress(PermissionError):
        state_dir.chmod(0o700)


@contextlib.contextmanager
def alone(state_dir: Path) -> Iterator[Callable[[str], None]]:
    """Be the only service that uses a state directory.

    Yields:
        To be called with the service's URL once it listens.

    Raises:
        ConfigError: Another service uses it.
    """
    path = state_dir / _NAME
    path.touch(0o600)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "another service uses it; end that one with `moedisco stop`, or choose another with --state-dir"
            raise ConfigError("--state-dir", str(state_dir), remedy) from error

        def tell(text: str) -> None:
            file.write(text + "\n")
            file.flush()

        file.truncate(0)
        tell(str(os.getpid()))
        yield tell
        file.truncate(0)


def find(state_dir: Path) -> RunningService | None:
    """The service that uses a state directory, if there is one."""
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


def end(state_dir: Path) -> bool:
    """End the service that uses a state directory, as Ctrl-C would, and wait for that.

    Returns:
        Whether there was one.

    Raises:
        RunError: It does not end.
    """
    found = find(state_dir)
    if found is None:
        return False
    os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    while find(state_dir) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"the service (process {found.pid}) does not end")
        time.sleep(0.1)
    return True
