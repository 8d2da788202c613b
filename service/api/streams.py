"""Streams a run's events to any number of readers.

Each run with readers has one feed: a task that reads the database when it is notified and keeps the newest messages. A
reader takes its next messages from the feed; a reader that is further behind reads pages from the database until it has
caught up. A waiting reader holds no thread and no database connection, and a slow reader does not delay others.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator

import anyio.to_thread
from anyio import CapacityLimiter
from pydantic_core import to_json

from service.database import runs, stream, tables
from service.database.session import Database
from service.domain.states import TERMINAL, RunState
from service.errors import DatabaseError
from service.notifier import Notifier
from service.observability import PrometheusMetrics, bound, logger

PAGE = 500
PING_SECONDS = 15.0
POLL_SECONDS = 5.0
"""Interval at which a feed polls the database, in seconds: the notifier does not report what other processes write."""
RECHECK_SECONDS = 60.0
_KEPT_MESSAGES = 2000
_KEPT_BYTES = 4 * 2**20
_READERS_AT_ONCE = 8
_PING = b": ping\n\n"
_OPENING = b"retry: 2000\n\n"
_END = b"event: end\ndata: {}\n\n"


@dataclasses.dataclass(frozen=True)
class _Page:
    """A page of the messages in a run's event stream.

    Attributes:
        messages: Encoded events after the requested position.
        first: Position of the first message.
        complete: Whether the page contains the newest event of the stream.
        ended: Whether the page is complete and the run has ended, so that no event follows.
    """

    messages: list[bytes]
    first: int
    complete: bool
    ended: bool


class Streams:
    """Streams the events of runs; one object serves all readers of the service."""

    def __init__(self, database: Database, notifier: Notifier, prometheus: PrometheusMetrics) -> None:
        self._database = database
        self._notifier = notifier
        self._prometheus = prometheus
        self._feeds: dict[str, _Feed] = {}
        self._limiter = CapacityLimiter(_READERS_AT_ONCE)
        self.closing = False

    def close(self) -> None:
        """End every stream after its current message; call this from the event loop's thread.

        Readers reconnect later.
        """
        self.closing = True
        for feed in self._feeds.values():
            feed.announce()
        self._notifier.notify_all()

    async def follow(self, run_id: str, after: int, allowed: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Yield the messages after a position, and new ones until the run has ended.

        Args:
            run_id: Id of the run.
            after: Last position that the reader has; -1 for none.
            allowed: Returns whether the reader still has access; called periodically in a thread.
        """
        yield _OPENING
        with (
            self._prometheus.streams.track_inprogress(),
            self._feed(run_id) as feed,
            contextlib.suppress(DatabaseError),
        ):
            checked = asyncio.get_running_loop().time()
            while not self.closing and not feed.gone:
                news = feed.news
                if after + 1 < feed.first:
                    page = await self.read(run_id, after)
                    chunk, after = (
                        (b"".join(page.messages), page.first + len(page.messages) - 1) if page else (b"", after)
                    )
                else:
                    chunk, after = feed.behind(after)
                if chunk:
                    yield chunk
                elif feed.ended:
                    yield _END
                    return
                elif not await _heard(news, PING_SECONDS):
                    yield _PING
                if asyncio.get_running_loop().time() - checked > RECHECK_SECONDS:
                    if not await anyio.to_thread.run_sync(allowed, limiter=self._limiter):
                        return
                    checked = asyncio.get_running_loop().time()

    async def replay(self, run_id: str, after: int) -> AsyncIterator[bytes]:
        """Yield the messages after position `after` (-1: from the first) up to the newest one, without waiting."""
        yield _OPENING
        with contextlib.suppress(DatabaseError):
            while (page := await self.read(run_id, after)) is not None and not self.closing:
                yield b"".join(page.messages)
                after = page.first + len(page.messages) - 1
                if page.complete:
                    if page.ended:
                        yield _END
                    return

    async def read(self, run_id: str, after: int) -> _Page | None:
        """Read a page of events after a position from the database; None if the run was deleted."""
        return await anyio.to_thread.run_sync(self._read, run_id, after, limiter=self._limiter)

    def _read(self, run_id: str, after: int) -> _Page | None:
        with self._database.read() as session:
            run = runs.get(session, run_id)
            if run is None:
                return None
            events = stream.read(session, run_id, after, PAGE)
        messages = [encode(event) for event in events]
        complete = after + len(messages) + 1 >= run.next_position
        return _Page(messages, after + 1, complete, complete and RunState(run.state) in TERMINAL)

    @contextlib.contextmanager
    def _feed(self, run_id: str) -> Iterator[_Feed]:
        feed = self._feeds.get(run_id)
        if feed is None:
            feed = self._feeds[run_id] = _Feed(run_id, self, self._notifier)
        feed.readers += 1
        try:
            yield feed
        finally:
            feed.readers -= 1
            if not feed.readers:
                feed.stop()
                self._feeds.pop(run_id, None)

    async def tail(self, run_id: str) -> int | None:
        """Position of the first message that a new feed loads, at most one page back; None if the run was deleted."""
        return await anyio.to_thread.run_sync(self._tail, run_id, limiter=self._limiter)

    def _tail(self, run_id: str) -> int | None:
        with self._database.read() as session:
            run = runs.get(session, run_id)
        return None if run is None else max(0, run.next_position - PAGE)


class _Feed:
    """Keeps the newest messages of one run in memory for its readers."""

    def __init__(self, run_id: str, streams: Streams, notifier: Notifier) -> None:
        self.readers = 0
        self.first = 0
        self.ended = False
        self.gone = False
        self.news = asyncio.Event()
        self._run_id = run_id
        self._streams = streams
        self._notifier = notifier
        self._messages: list[bytes] = []
        self._bytes = 0
        self._task = asyncio.create_task(self._work())

    def behind(self, after: int) -> tuple[bytes, int]:
        """The feed's messages after a position, at most one page, and the position of the last one returned."""
        start = after + 1 - self.first
        messages = self._messages[start : start + PAGE]
        return b"".join(messages), after + len(messages)

    def announce(self) -> None:
        """Wake every reader."""
        self.news.set()
        self.news = asyncio.Event()

    def stop(self) -> None:
        self._task.cancel()

    async def _work(self) -> None:
        with bound(run_id=self._run_id), self._notifier.subscribe(self._run_id) as subscription:
            placed = False
            while not self._streams.closing and not self.gone:
                try:
                    placed = placed or await self._place()
                    complete = await self._advance()
                except DatabaseError as error:
                    logger(__name__).warning("a stream waits for the database", error=str(error))
                    complete = True
                if complete:
                    await subscription.wait(POLL_SECONDS)

    async def _place(self) -> bool:
        tail = await self._streams.tail(self._run_id)
        self.first, self.gone = tail or 0, tail is None
        return True

    async def _advance(self) -> bool:
        end = self.first + len(self._messages)
        page = await self._streams.read(self._run_id, end - 1)
        if page is None:
            self.gone = True
            self.announce()
            return True
        self._messages += page.messages
        self._bytes += sum(map(len, page.messages))
        while len(self._messages) > _KEPT_MESSAGES or (self._bytes > _KEPT_BYTES and len(self._messages) > 1):
            dropped = self._messages[: max(1, len(self._messages) // 4)]
            del self._messages[: len(dropped)]
            self.first += len(dropped)
            self._bytes -= sum(map(len, dropped))
        if page.messages or page.ended != self.ended:
            self.ended = page.ended
            self.announce()
        return page.complete


def encode(event: tables.EventRow) -> bytes:
    """Encode an event as a server-sent message."""
    data = {"type": event.type, "stage": event.stage, "unit": event.unit, "data": event.data, "time": event.time}
    kind = event.type if event.type.isidentifier() else "message"
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.position, kind.encode(), to_json(data, inf_nan_mode="null"))


async def _heard(news: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(news.wait(), seconds)
    except TimeoutError:
        return False
    return True
