"""What is no longer needed goes."""

from __future__ import annotations

from service.database import idempotency, webhooks
from service.database.session import Database

DELIVERIES_KEPT = 7 * 24 * 3600.0


class Housekeeping:
    """Forgets old idempotency keys and settled deliveries.

    Args:
        database: Where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def round(self, now: float) -> None:
        """Forget keys after a day, and deliveries that arrived or were given up after a week."""
        with self._database.write() as session:
            idempotency.purge(session, now)
        with self._database.write() as session:
            webhooks.purge(session, now - DELIVERIES_KEPT)
