"""Sends a notice about each run that has ended to the URL of its project, or of its owner."""

from __future__ import annotations

from collections.abc import Callable

from service import notices as sending
from service.background.end_messages import Backoff
from service.database import notices
from service.database.gauges import GIVE_UP_SECONDS
from service.database.notices import Waiting
from service.database.session import Database
from service.domain.notices import Notice
from service.errors import Conflict
from service.observability import logger

_log = logger(__name__)
AT_ONCE = 50
"""Maximum number of runs that are looked at in one round."""


class Notices:
    """Sends the notices of all projects, each until its URL has accepted it or a day has passed.

    A URL that accepts none waits longer after each failure, and holds up no other.

    Args:
        key: Key of the secrets of projects.
        url: URL of the service, for links.
        check: Called before each notice; raises if another process may send notices now.
        allows: Whether an IP address may be connected to.
    """

    def __init__(
        self,
        database: Database,
        key: bytes,
        url: str,
        *,
        check: Callable[[], None] = lambda: None,
        allows: Callable[[str], bool] = sending.is_public,
    ) -> None:
        self._database = database
        self._key = key
        self._url = url
        self._check = check
        self._allows = allows
        self._away: dict[str, Backoff] = {}

    def round(self, now: float) -> None:
        """Send the notices that were not sent yet.

        Raises:
            DatabaseUnavailable: The database does not answer.
            LeaseLost: Another process may send notices now.
        """
        away = [project for project, backoff in self._away.items() if now < backoff.until]
        with self._database.read() as session:
            found = notices.waiting(session, since=now - GIVE_UP_SECONDS, limit=AT_ONCE, without=away)
        for each in found:
            before = self._away.get(each.url.project_id, Backoff())
            if now < before.until:
                continue
            self._check()
            failure = self._send(each)
            self._away[each.url.project_id] = Backoff() if failure is None else before.longer(now)
            with self._database.write() as session:
                notices.outcome(session, each, now, failure)
            if failure is not None:
                _log.warning("notice about the end of run %s will be sent again: %s", each.run.id, failure)

    def _send(self, found: Waiting) -> str | None:
        notice = notice_of(found, self._url)
        about = {"type": "run.ended", "time": found.run.ended, "run": vars(notice)}
        try:
            return sending.send(notices.url_of(self._key, found.url), notice.text, about, self._allows)
        except Conflict as error:
            return str(error)


def notice_of(found: Waiting, url: str) -> Notice:
    """The notice about a run of the service at a URL."""
    run = found.run
    return Notice(
        id=run.id,
        name=run.name,
        owner=run.owner,
        state=run.state,
        reason=run.reason,
        attempt=run.attempt,
        dollars=run.dollars,
        hours=run.hours,
        held_out_loss=run.held_out_loss,
        perplexity=run.perplexity,
        parent_loss=found.parent_loss,
        link=f"{url}/#/runs/{run.id}",
    )
