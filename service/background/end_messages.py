"""Posts a signed message to the operator's URL about each run that has ended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal

import httpx

from service.database import runs
from service.database.gauges import GIVE_UP_SECONDS
from service.database.session import Database
from service.database.tables import RunRow
from service.domain.signatures import SIGNATURE_HEADER, sign
from service.observability import logger

_log = logger(__name__)
AT_ONCE = 10
"""Maximum number of messages that are posted in one round."""
TIMEOUT = httpx.Timeout(10, connect=5)
"""Maximum time for one step of a request, such as to receive a part of the response, in seconds."""
FIRST_DELAY = 5.0
"""Delay after the first failed request, in seconds. It doubles with each further failure."""
LONGEST_DELAY = 3600.0
_REFUSALS = frozenset({400, 409, 410, 413, 414, 415, 422, 431})
"""Answers that are about the message, and not about the receiver or its URL."""


Answer = Literal["accepted", "refused", "unreachable"]
"""What became of a request: `unreachable` also means an answer that the receiver cannot work."""


class EndMessages:
    """Posts a message about each run that has ended, until the receiver has accepted it or a day has passed.

    A message can arrive twice if the service ends before it has stored the answer; both name the same run and attempt.
    A process that has lost the lease meanwhile still stores the answer, so that its successor does not post again.

    Args:
        url: URL that receives the messages; redirects are not followed.
        secret: Secret that signs them.
        count: Called with what became of each request.
        check: Called before each request; raises if another process may post the messages now.
    """

    def __init__(
        self,
        database: Database,
        url: str,
        secret: str,
        *,
        count: Callable[[Answer], None] = lambda _: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._url = url
        self._secret = secret
        self._count = count
        self._check = check
        self._away = Backoff()
        self._refused: dict[tuple[str, int], Backoff] = {}

    def round(self, now: float) -> None:
        """Post the messages that no one has received, those of the first runs to end first.

        A receiver that does not answer, or says that it cannot work, is tried again later with all of them. One that
        refuses a message is given the others, and this one again later.

        Raises:
            DatabaseUnavailable: The database does not answer.
            LeaseLost: Another process may post the messages now.
        """
        if now < self._away.until:
            return
        with self._database.read() as session:
            ended = runs.unposted(session, since=now - GIVE_UP_SECONDS, limit=AT_ONCE + len(self._refused))
        keys = {(run.id, run.attempt) for run in ended}
        self._refused = {key: waiting for key, waiting in self._refused.items() if key in keys}
        for run in ended:
            refused = self._refused.get((run.id, run.attempt), Backoff())
            if now < refused.until:
                continue
            self._check()
            failure = self._post(_message(run), now)
            self._count("accepted" if failure is None else "refused" if failure.is_refusal else "unreachable")
            if failure is None:
                self._away = Backoff()
                with self._database.write() as session:
                    runs.posted(session, run, now)
                continue
            _log.warning("message about the end of run %s will be sent again: %s", run.id, failure.reason)
            if not failure.is_refusal:
                self._away = self._away.longer(now)
                return
            self._refused[run.id, run.attempt] = refused.longer(now)

    def _post(self, message: dict[str, Any], now: float) -> _Failure | None:
        """Send a message; returns why it was not accepted, None if it was."""
        body = json.dumps(message, separators=(",", ":")).encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "moedisco",
            SIGNATURE_HEADER: sign(self._secret, body, now),
        }
        try:
            with httpx.stream("POST", self._url, content=body, headers=headers, timeout=TIMEOUT) as answer:
                status = answer.status_code
                return None if answer.is_success else _Failure(f"status {status}", status in _REFUSALS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return _Failure(f"{type(error).__name__}: {error}", is_refusal=False)


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why a message was not accepted, and whether the receiver refuses this one and may accept others."""

    reason: str
    is_refusal: bool


@dataclasses.dataclass(frozen=True)
class Backoff:
    """A number of failures in a row, and the time of the next attempt."""

    failures: int = 0
    until: float = float("-inf")

    def longer(self, now: float) -> Backoff:
        """After one more failure."""
        return Backoff(self.failures + 1, now + delay(self.failures))


def delay(failures: int) -> float:
    """Seconds until the next attempt, after a number of earlier failures in a row."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures, 60))


def _message(run: RunRow) -> dict[str, Any]:
    about = {
        "id": run.id,
        "name": run.name,
        "owner": run.owner,
        "state": run.state,
        "reason": run.reason,
        "attempt": run.attempt,
        "dollars": run.dollars,
    }
    return {"type": "run.ended", "time": run.ended, "run": about}
