"""Upload growing files of a run, such as its events, so that they can be read at its URI while the run continues."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from moedisco_ray.core.errors import RunError, StorageError
from moedisco_ray.core.store.run_store import RunStore

_INTERVAL_SECONDS = 5.0
"""Minimum interval between two uploads of a file, in seconds: one request every 5 s costs less than half a cent per
hour on S3."""
_BYTES_PER_SECOND = 1 << 20
"""Maximum mean bandwidth of repeated uploads of one file (bytes/s): a file of 100 MB is uploaded about every 100 s."""


class LiveFiles:
    """Uploads changed files of a run from a background thread, and a last time when the block ends.

    Args:
        store: The run.
        names: Names of the files, relative to the run directory.
        check: Called before each upload. If it raises a `RunError`, because another driver has taken over the run,
            nothing more is uploaded.
    """

    def __init__(self, store: RunStore, names: Sequence[str], check: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._check = check
        self._due = dict.fromkeys(names, 0.0)
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._upload_regularly, name="live-files", daemon=True)

    def __enter__(self) -> Self:
        if self._store.is_remote:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store.is_remote:
            self._ended.set()
            self._thread.join()
            with contextlib.suppress(*(() if error is None else (StorageError, RunError))):
                for name in self._due:
                    self._upload(name)

    def _upload_regularly(self) -> None:
        with contextlib.suppress(RunError):
            while not self._ended.wait(_INTERVAL_SECONDS):
                for name, due in self._due.items():
                    if time.monotonic() >= due:
                        with contextlib.suppress(StorageError):  # the next pass tries again
                            self._upload(name)

    def _upload(self, name: str) -> None:
        path = self._store.directory / name
        if not path.exists():
            return
        found = path.stat()
        if self._uploaded.get(name) != (found.st_size, found.st_mtime_ns):
            self._check()
            self._store.publish(path)
            self._uploaded[name] = found.st_size, found.st_mtime_ns
            self._due[name] = time.monotonic() + found.st_size / _BYTES_PER_SECOND
