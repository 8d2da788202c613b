"""One service per state directory: who it is, and how to end it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from moedisco_ray.errors import ConfigError, RunError

_NAME = "service.pid"
_END_SECONDS = 60.0


@contextlib.contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """Be the only service that uses a state directory.

    Raises:
        ConfigError: Another one does.
    """
    with (state_dir / _NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "another service uses it; end that one with `moedisco stop`, or choose another with --state-dir"
            raise ConfigError("--state-dir", str(state_dir), remedy) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def running(state_dir: Path) -> int | None:
    """The process id of the service that uses a state directory; None: there is none."""
    try:
        with (state_dir / _NAME).open("r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read())
    except (FileNotFoundError, ValueError):
        pass
    return None


def end(state_dir: Path) -> bool:
    """End the service that uses a state directory, as Ctrl-C would, and wait for that.

    Returns:
        Whether there was one.

    Raises:
        RunError: It does not end.
    """
    pid = running(state_dir)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    while running(state_dir) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"the service (process {pid}) does not end")
        time.sleep(0.1)
    return True
