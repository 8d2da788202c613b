"""Sends webhook deliveries from the outbox until they arrive or a day has passed.

A delivery can arrive twice if the service ends before it has stored the response; both copies have the same id.
"""

from __future__ import annotations

import dataclasses
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from service.background.outgoing import Outgoing, Undeliverable
from service.database import webhooks
from service.database.documents import Unreadable
from service.database.session import Database
from service.domain.signatures import SIGNATURE_HEADER, sign
from service.errors import DatabaseError
from service.observability import logger

_log = logger(__name__)
DELIVERY_HEADER = "X-MoeDisco-Delivery"
AT_ONCE = 8
"""Maximum number of deliveries sent in parallel."""
AT_ONCE_PER_WEBHOOK = 2
"""Maximum number of deliveries sent to one webhook in parallel, so that a slow receiver delays only its own messages."""
FIRST_DELAY = 5.0
"""Delay after the first failed attempt, in seconds. It doubles with each further failure."""
LONGEST_DELAY = 3600.0
GIVE_UP_SECONDS = 24 * 3600.0
"""Time from the creation of a delivery to its last attempt, in seconds."""


@dataclasses.dataclass(frozen=True)
class _Message:
    id: str
    webhook_id: str
    url: str
    secret: str = dataclasses.field(repr=False)
    body: dict[str, Any]
    created: float
    attempts: int


class Deliveries:
    """Sends deliveries when they are due.

    Args:
        clock: Returns seconds since the epoch.
        fraction: Returns a random number from 0 to 1, for the jitter of the backoff.
    """

    def __init__(
        self, database: Database, outgoing: Outgoing, clock: Callable[[], float] = time.time,
        fraction: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._outgoing = outgoing
        self._clock = clock
        self._fraction = fraction
        self._workers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="delivery")
        self._lock = threading.Lock()
        self._under_way: dict[str, str] = {}
        self._turns: dict[str, float] = {}

    def round(self, now: float) -> None:
        """Start sending due deliveries; does not wait for them to finish.

        Raises:
            DatabaseUnavailable: The database does not answer.
        """
        with self._lock:
            before = set(self._under_way)   # do not send these again, even if one ends while the query runs
        with self._database.read() as session:
            due = [
                _Message(
                    id=each.id, webhook_id=hook.id, url=hook.url, secret=hook.secret, body=each.body, created=each.created,
                    attempts=each.attempts)
                for each, hook in webhooks.due(session, now, AT_ONCE_PER_WEBHOOK, before)]
        for message in self._taken(due):
            self._workers.submit(self._deliver, message)

    def close(self) -> None:
        """Wait for the deliveries that are being sent."""
        self._workers.shutdown(wait=True)

    def _taken(self, due: list[_Message]) -> list[_Message]:
        """Choose what to send now: webhooks take turns, so that those that do not answer hold up no others."""
        with self._lock:
            busy = Counter(self._under_way.values())
            self._turns = {message.webhook_id: self._turns.get(message.webhook_id, 0.0) for message in due}
            taken: list[_Message] = []
            while due and len(self._under_way) < AT_ONCE:
                message = min(due, key=lambda each: (busy[each.webhook_id], self._turns[each.webhook_id]))
                if busy[message.webhook_id] == AT_ONCE_PER_WEBHOOK:
                    break
                due.remove(message)
                self._under_way[message.id] = message.webhook_id
                self._turns[message.webhook_id] = time.monotonic()
                busy[message.webhook_id] += 1
                taken.append(message)
        return taken

    def _deliver(self, message: _Message) -> None:
        try:
            arrived, answer = self._send(message)
            now = self._clock()
            again = None if arrived else next_try(message.created, message.attempts + 1, now, self._fraction())
            with self._database.write() as session:
                webhooks.record_attempt(session, message.id, delivered=now if arrived else None, answer=answer, due=again)
        except DatabaseError as error:
            _log.warning("delivery %s will be sent again: %s", message.id, error)
        except Exception:  # noqa: BLE001 - nobody waits for this thread: without the log, the failure would leave no trace
            _log.exception("delivery %s failed", message.id)
        finally:
            with self._lock:
                del self._under_way[message.id]

    def _send(self, message: _Message) -> tuple[bool, str]:
        if isinstance(message.body, Unreadable):
            return False, message.body.why
        body = json.dumps(message.body, separators=(",", ":")).encode()
        try:
            status = self._outgoing.post(message.url, body, {
                "Content-Type": "application/json",
                "User-Agent": "moedisco",
                DELIVERY_HEADER: message.id,
                SIGNATURE_HEADER: sign(message.secret, body, self._clock()),
            })
        except Undeliverable as error:
            return False, str(error)
        return 200 <= status < 300, str(status)


def delay(attempts: int, fraction: float) -> float:
    """Delay before the next attempt, in seconds. It doubles with each failed attempt, up to an hour.

    `fraction` is the jitter: 0 gives half of this delay, 1 gives all of it.
    """
    whole = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(attempts - 1, 60))
    return whole * (1 + fraction) / 2


def next_try(created: float, attempts: int, now: float, fraction: float) -> float | None:
    """Time of the next attempt; None after the last one, which is made a day after `created`."""
    end = created + GIVE_UP_SECONDS
    return None if now >= end else min(end, now + delay(attempts, fraction))
