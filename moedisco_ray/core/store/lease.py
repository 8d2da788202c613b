"""The lease of a run at a URI, with which only one driver at a time works on the run.

The driver renews `lease.json` every few seconds. Another driver takes over the lease only if it has seen no renewal for
`STALE_SECONDS`. It writes its own id to the file and reads the file again: if two drivers start at the same time, the
one that wrote last keeps the lease.

pyarrow offers no atomic test-and-set on object stores, so a driver may replace the lease of another one that is still
alive: if its own first write arrives late, or if the other one could not renew the lease for `STALE_SECONDS`. Two
rules keep the run intact:

- A driver reads the lease right before it commits or deletes anything (`Lease.check`), and ends if the lease names
  another driver. So it never deletes objects of its successor, and never commits objects that its successor has
  deleted.
- A driver whose first write arrived late waits for `NOTICE_SECONDS` before it begins, so that a commit that the other
  driver had checked before is complete.

Until the check, both drivers may upload objects. Their names differ, and no manifest lists those of the driver that
ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from moedisco_ray.core.store.manifests import LEASE
from moedisco_ray.core.store.run_store import RunStore

RENEW_SECONDS = 10.0
"""Interval between two renewals of the lease, in seconds."""
STALE_SECONDS = 45.0
"""Seconds without a renewal after which a driver counts as dead: four intervals, and some time for a slow renewal."""
SETTLE_SECONDS = 1.0
"""Seconds between writing a lease and reading it again; a write that took longer may have replaced another driver's
lease."""
NOTICE_SECONDS = 2 * RENEW_SECONDS
"""Seconds in which a driver notices that its lease was replaced: a renewal interval, and some time for a slow read."""
POLL_SECONDS = 1.0
_REMEDY = "another process works on this run; wait for it, or end it"


class Lease:
    """A driver's lease of a run.

    Attributes:
        fresh: Whether to ignore this machine's working copy, because the run is new or its last driver used another
            copy.
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
        seen = time.monotonic()
        held, deadline = _read(self._store), seen + seconds
        changed = time.monotonic()
        # A lease with the same working copy is from a driver that has ended: this process holds the copy's lock now.
        while held is not None and not held["released"] and held["copy"] != self._copy:
            now = time.monotonic()
            if now - changed >= STALE_SECONDS:
                break
            time.sleep(POLL_SECONDS)
            seen = time.monotonic()
            latest = _read(self._store)
            if latest != held:
                if now >= deadline:
                    raise RunDirError("output", str(self._store.location), _REMEDY)
                held, changed = latest, now
        self.fresh = held is None or held["copy"] != self._copy
        self._write(self._store, released=False)
        # Another driver may have taken the lease after `seen`, and have read it again before a late write replaced it.
        late = time.monotonic() - seen > SETTLE_SECONDS
        time.sleep(NOTICE_SECONDS if late else SETTLE_SECONDS)
        if self._is_replaced(self._store):
            raise RunDirError("output", str(self._store.location), _REMEDY)

    def check(self) -> None:
        """Read the lease, and raise an error if another driver has taken over the run.

        Raises:
            RunError: Another driver works on the run now.
            StorageError: The URI does not respond.
        """
        self._lost = self._lost or self._is_replaced(self._store)
        if self._lost:
            raise RunError(f"another driver has taken over {self._store.location}; this one ends")

    def keep(self) -> None:
        """Renew the lease at regular intervals until it is released or lost."""
        # Without retries, so that a renewal is never late: it would replace the lease of a driver that took over
        # meanwhile.
        store = dataclasses.replace(self._store, pauses=())
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(StorageError):  # the next renewal tries again
                if self._is_replaced(store):
                    self._lost = True
                    return
                self._write(store, released=False)

    def release(self) -> None:
        """Release the lease, so that another driver can take it at once."""
        self._ended.set()
        if not self._lost and not self._is_replaced(self._store):
            self._write(self._store, released=True)

    def _is_replaced(self, store: RunStore) -> bool:
        found = _read(store)
        return found is not None and found["session"] != self._session

    def _write(self, store: RunStore, *, released: bool) -> None:
        self._beat += 1
        store.remote.write(
            LEASE,
            json.dumps(
                {
                    "session": self._session,
                    "copy": self._copy,
                    "machine": socket.gethostname(),
                    "beat": self._beat,
                    "released": released,
                }
            ).encode(),
        )


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
            with contextlib.suppress(StorageError):  # the lease becomes stale instead
                lease.release()


def is_leased(store: RunStore) -> bool:
    """Whether a driver probably works on a run at a URI: its lease was renewed recently, by this machine's clock."""
    held, renewed = _read(store), store.remote.modified(LEASE)
    return (
        held is not None and not held["released"] and renewed is not None and time.time() - renewed < 2 * STALE_SECONDS
    )


def _flock(lock: Any, seconds: float, store: RunStore) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise RunDirError("output", str(store.location), _REMEDY) from error
            time.sleep(POLL_SECONDS / 5)
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
