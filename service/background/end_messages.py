"""Posts a signed message to the operator's URL about each run that has ended."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import httpx

from moedisco_ray.core.secret_file import kept_secret
from service.database import runs
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
GIVE_UP_SECONDS = 24 * 3600.0
"""Time from the end of a run to the last attempt to post its message, in seconds."""


def webhook_secret(state_dir: Path) -> str:
    """Secret that signs the messages, from STATE_DIR/webhook-secret, created if absent.

    Raises:
        OSError: The file can be neither read nor created.
    """
    return kept_secret(state_dir / "webhook-secret", lambda: secrets.token_urlsafe(32).encode()).decode()


class EndMessages:
    """Posts a message about each run that has ended, until the receiver has accepted it or a day has passed.

    A message can arrive twice if the service ends before it has stored the answer; both name the same run and attempt.

    Args:
        url: URL that receives the messages; redirects are not followed.
        secret: Secret that signs them.
    """

    def __init__(self, database: Database, url: str, secret: str) -> None:
        self._database = database
        self._url = url
        self._secret = secret
        self._failures = 0
        self._next_try = float("-inf")

    def round(self, now: float) -> None:
        """Post the messages that no one has received, those of the first runs to end first; stop at the first failure.

        Raises:
            DatabaseUnavailable: The database does not answer.
        """
        if now < self._next_try:
            return
        with self._database.read() as session:
            ended = runs.unposted(session, since=now - GIVE_UP_SECONDS, limit=AT_ONCE)
        for run in ended:
            answer = self._post(_message(run), now)
            if answer is not None:
                _log.warning("message about the end of run %s will be sent again: %s", run.id, answer)
                self._next_try = now + delay(self._failures)
                self._failures += 1
                return
            self._failures = 0
            with self._database.write() as session:
                runs.posted(session, run, now)

    def _post(self, message: dict[str, Any], now: float) -> str | None:
        """Send a message; returns why it was not accepted, None if it was."""
        body = json.dumps(message, separators=(",", ":")).encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "moedisco",
            SIGNATURE_HEADER: sign(self._secret, body, now),
        }
        try:
            with httpx.stream("POST", self._url, content=body, headers=headers, timeout=TIMEOUT) as answer:
                return None if answer.is_success else f"status {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return f"{type(error).__name__}: {error}"


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
