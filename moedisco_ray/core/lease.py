"""The lease of a run at a URI, with which only one driver at a time works on the run.

The driver renews `lease.json` every few seconds. Another driver takes over the lease only if it has seen no renewal for
`_STALE_SECONDS`. It writes its own id to the file and reads the file again: if two drivers start at the same time, the one that
wrote last keeps the lease.

pyarrow offers no atomic test-and-set on object stores, so the lease is no guarantee. If a driver loses its connection to the store
for longer than `_STALE_SECONDS`, another driver may take over the run. When the first driver reconnects, it detects this at its
next renewal and commits nothing more. Until then both drivers may upload. They write different objects, and the manifest that is
written last is valid.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moedisco_ray.core.errors import RunDirError, RunError, StorageError
from moedisco_ray.core.manifests import LEASE
from moedisco_ray.core.run_store import RunStore

_RENEW_SECONDS = 10.0
"""Interval between two renewals of the lease, in seconds."""
_STALE_SECONDS = 45.0
"""Seconds without a renewal after which a driver counts as dead: four intervals, and some time for a slow renewal."""
_SETTLE_SECONDS = 1.0
"""Seconds between writing a lease and reading it again: another driver's write takes less time."""
_POLL_SECONDS = 1.0
_REMEDY = "another process works on this run; wait for it, or end it"


class Lease:
    """A driver's lease of a run.

    Attributes:
        fresh: Whether to ignore this machine's working copy, because the run is new or its last driver used another copy.
    """

    def __init__(self, store: RunStore, copy: str) -> None:
        self._store = store
        self._copy = copy
        self._session = uuid.uuid4().hex
        self._beat = 0
        self._ended = threading.Event()
        self._lost = False
        self.fresh = True

    def take(self, seconds: float) -> None:
        """Take the lease.

        Args:
            seconds: Maximum number of seconds to wait until another driver releases the run.

        Raises:
            RunDirError: Another driver works on the run.
        """
        held, deadline = _read(self._store), time.monotonic() + seconds
        changed = time.monotonic()
        # A lease with the same working copy is from a driver that has ended: this process holds the copy's lock now.
        while held is not None and not held["released"] and held["copy"] != self._copy:
            now = time.monotonic()
            if now - changed >= _STALE_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
            latest = _read(self._store)
            if latest != held:
                if now >= deadline:
                    raise RunDirError("output", str(self._store.location), _REMEDY)
                held, changed = latest, now
        self.fresh = held is None or held["copy"] != self._copy
        self._write(released=False)
        time.sleep(_SETTLE_SECONDS)
        found = _read(self._store)
        if found is None or found["session"] != self._session:
            raise RunDirError("output", str(self._store.location), _REMEDY)

    def check(self) -> None:
        """Raise an error if another driver has taken over the run.

        Raises:
            RunError: Another driver works on the run now.
        """
        if self._lost:
            raise RunError(f"another driver has taken over {self._store.location}; this one ends")

    def keep(self) -> None:
        """Renew the lease at regular intervals until it is released or lost."""
        while not self._ended.wait(_RENEW_SECONDS):
            with contextlib.suppress(StorageError):     # the next renewal tries again
                found = _read(self._store)
                if found is not None and found["session"] != self._session:
                    self._lost = True
                    return
                self._write(released=False)

    def release(self) -> None:
        """Release the lease, so that another driver can take it at once."""
        self._ended.set()
        if not self._lost:
            self._write(released=True)

    def _write(self, *, released: bool) -> None:
        self._beat += 1
        self._store.remote.write(LEASE, json.dumps({
            "session": self._session, "copy": self._copy, "machine": socket.gethostname(), "beat": self._beat,
            "released": released}).encode())


@contextlib.contextmanager
def leased(store: RunStore, seconds: float) -> Iterator[Lease]:
    """Hold the lease of a run at a URI until the block ends.

    Args:
        store: The run.
        seconds: Maximum number of seconds to wait until another driver releases the run.

    Raises:
        RunDirError: Another driver works on the run.
    """
    store.home.mkdir(parents=True, exist_ok=True)
    with (store.home / "lock").open("a") as lock:
        _flock(lock, seconds, store)
        lease = Lease(store, _copy_id(store.home / "copy"))
        lease.take(seconds)
        thread = threading.Thread(target=lease.keep, name="lease", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            with contextlib.suppress(StorageError):     # the lease becomes stale instead
                lease.release()


def is_leased(store: RunStore) -> bool:
    """Whether a driver probably works on a run at a URI: its lease was renewed recently, if this machine's clock is right."""
    held, renewed = _read(store), store.remote.modified(LEASE)
    return held is not None and not held["released"] and renewed is not None and time.time() - renewed < 2 * _STALE_SECONDS


def _flock(lock: Any, seconds: float, store: RunStore) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise RunDirError("output", str(store.location), _REMEDY) from error
            time.sleep(_POLL_SECONDS / 5)
        else:
            return


def _copy_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _read(store: RunStore) -> dict[str, Any] | None:
    content = store.remote.read(LEASE)
    found: dict[str, Any] | None = None if content is None else json.loads(content)
    return found
