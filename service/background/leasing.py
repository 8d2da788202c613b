"""Lets only one process of the service, the holder of a lease in the database, do the background work.

The reconciler's thread takes and renews the lease, so that a process whose reconciler hangs loses it. Other threads
only look whether enough of the term is left. Each writing transaction of the background work checks in the database
that no other process has taken the lease, so a process that was suspended for longer than the term writes nothing.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.orm import Session

from moedisco_ray.core.secret_file import kept_secret
from service.database import leases
from service.database.leases import Claim
from service.database.session import Database, Guard
from service.errors import LeaseLost
from service.observability import logger

_log = logger(__name__)
TERM_SECONDS = 30.0
"""Time from the last renewal of the lease until another process may take it, in seconds."""
RENEW_SECONDS = 3.0
"""Minimum time between two renewals, in seconds."""
MARGIN_SECONDS = 10.0
"""Time before the end of the term at which the holder begins no further step, in seconds."""


class BackgroundLease:
    """The lease of the background work, as one process of the service sees it.

    Args:
        holder: Name of this replica; see `replica_name`.
        clock: Returns monotonic seconds.
    """

    def __init__(self, database: Database, holder: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._holder = holder
        self._clock = clock
        self._lock = threading.Lock()
        self._claim: Claim | None = None
        self._starts = True
        self._renewed = float("-inf")
        self._completed = False

    @property
    def held(self) -> bool:
        """Whether this process holds the lease, with enough time left for one more step."""
        return self._claim is not None and self._clock() - self._renewed < TERM_SECONDS - MARGIN_SECONDS

    def acquire(self) -> bool:
        """Take the lease, or renew it if that is due; returns whether this process holds it.

        Raises:
            DatabaseUnavailable: The database does not answer.
        """
        with self._lock:
            held = self._claim is not None
            if not self._renew_if_due():
                began = self._clock()
                with self._database.write() as session:
                    self._claim = leases.take(session, leases.LEASE, self._holder, TERM_SECONDS, starts=self._starts)
                self._renewed, self._starts = began, False
            if (self._claim is not None) != held:
                _log.info("%s the background work", "this replica does" if self._claim else "another replica does")
            return self._claim is not None

    def check(self) -> None:
        """Check that this process still does the background work.

        Raises:
            LeaseLost: It does not, or too little of the term is left for a step.
        """
        if not self.held:
            raise _lost()

    def release(self) -> None:
        """End the lease if this process holds it, so that another replica continues at once."""
        with self._lock:
            if self._claim is not None:
                with self._database.write() as session:
                    leases.release(session, self._claim)
                self._claim = None

    def renewing(self) -> Database:
        """The database for the reconciler: it renews the lease between the steps of a round."""
        return self._database.guarded(Guard(self._renew_or_raise, self._check_in_database))

    def checking(self) -> Database:
        """The database for the other threads, which stop when the reconciler does not renew the lease in time."""
        return self._database.guarded(Guard(self.check, self._check_in_database))

    def rounds(self, work: Callable[[float], None]) -> Callable[[float], None]:
        """The reconciler's rounds: each takes or renews the lease, and does nothing if another process holds it."""

        def one(now: float) -> None:
            if self.acquire():
                work(now)
                self._completed = True

        return one

    def while_held(self, work: Callable[[float], None]) -> Callable[[float], None]:
        """Rounds of other work, which do nothing in a process that does not hold the lease."""

        def one(now: float) -> None:
            if self.held:
                work(now)

        return one

    def _renew_if_due(self) -> bool:
        """Renew the lease unless that was done a moment ago; returns whether this process still holds it."""
        if self._claim is None:
            return False
        began = self._clock()
        if began - self._renewed < RENEW_SECONDS:
            return True
        with self._database.write() as session:
            if not leases.renew(session, self._claim, TERM_SECONDS):
                self._claim = None
                return False
            if self._completed:
                leases.done(session, leases.ROUND)
        self._renewed, self._completed = began, False
        return True

    def _renew_or_raise(self) -> None:
        with self._lock:
            if not self._renew_if_due():
                raise _lost()

    def _check_in_database(self, session: Session) -> None:
        claim = self._claim
        if claim is None or not leases.holds(session, claim):
            raise _lost()


def replica_name(state_dir: Path) -> str:
    """Name of the replica with this state directory, which only one process at a time can use.

    Raises:
        OSError: The file of its random part can be neither read nor created.
    """
    return (
        f"{socket.gethostname()}-{kept_secret(state_dir / 'replica', lambda: secrets.token_hex(4).encode()).decode()}"
    )


def _lost() -> LeaseLost:
    return LeaseLost("another replica of the service does the background work, or the lease was not renewed in time")
