"""Following a run's stream: what to ask for, what to hand on, and when to stop, apart from what carries it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx

from moedisco_ray.core.events import Event
from service.client import run_calls
from service.client.asking import after_refusal, away, next_pause
from service.client.calls import Answer, Call
from service.client.messages import COMMENT, Lines, Message, Messages
from service.client.patience import PASSING, Attempts, Patience

_END = "end"
_PASSING = PASSING | {500}
"""A service that is about to end answers with 500 what it cuts short."""


class EventFollower:
    """Hands on every event once, in order, over as many connections as it takes.

    A client loops until `done`: send `call`, tell `opened`, give every piece to `take`, then tell how the connection ended
    (`closed` or `lost`) and wait `pause` seconds.

    Args:
        run_id: The run.
        after: Position of the last event already seen; None: from the start.
        follow: Go on until the run ends; else stop at the newest event.
        patience: How long the service may be away.
        url: The service's, for messages.
    """

    def __init__(self, run_id: str, after: int | None, follow: bool, patience: Patience, url: str) -> None:
        self.done = False
        self.pause = 0.0
        self._run_id = run_id
        self._last = after
        self._follow = follow
        self._url = url
        self._attempts = Attempts(patience)
        self._messages = Messages()
        self._news = False

    @property
    def call(self) -> Call[None]:
        """The request for what follows the last event that was handed on."""
        return run_calls.events(self._run_id, self._last, self._follow)

    def opened(self, answer: Answer) -> bool:
        """Take the head of the answer (with its body where it is a refusal); whether events follow.

        Raises:
            ServiceProblem: There is nothing to follow.
        """
        self._messages = Messages()
        self._news = False
        self.pause = 0.0
        if answer.status == 200:
            return True
        self.pause = after_refusal(self._attempts, answer, _PASSING)
        return False

    def take(self, chunk: bytes) -> Iterator[tuple[int, Event]]:
        """The new events, with their positions, that a piece of the stream completes.

        Raises:
            httpx.RemoteProtocolError: What came cannot be the stream; asking again gets what is missing.
        """
        for message in self._messages.take(chunk):
            if message.kind == _END:
                self.done = True
                return
            if message.kind == COMMENT:
                self._attempts.went_well()
                continue
            position, event = _read(message)
            wanted = 0 if self._last is None else self._last + 1
            if position > wanted:
                raise httpx.RemoteProtocolError(f"the stream jumped from event {wanted} to {position}")
            if position == wanted:
                self._last = position
                self._attempts.went_well()
                self._news = True
                yield position, event

    def closed(self) -> None:
        """The connection ended in good order, which a restart of the service can look like.

        Raises:
            ServiceAway: It does so time and again without a new event.
        """
        if not self._follow:
            # A service that is ending closes like one that has sent everything; only a further answer tells.
            self.done = not self._news
        elif not self.done:
            self.lost(httpx.RemoteProtocolError("the stream ended before the run did"))

    def lost(self, error: httpx.TransportError) -> None:
        """The connection died, or never was.

        Raises:
            ServiceAway: Patience is over.
        """
        self.pause = next_pause(self._attempts, away(self._url, error))


def _read(message: Message) -> tuple[int, Event]:
    try:
        event = json.loads(message.data)
        return int(message.id or ""), Event(
            type=event["type"], stage=event.get("stage"), unit=event.get("unit"), data=event.get("data") or {}, time=event["time"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise httpx.RemoteProtocolError(f"a message of the stream is no event: {message.data[:80]!r}") from error


class LogFollower:
    """Hands on the lines of a log as they come. A client loops as for events.

    A log has no positions, so that a connection that dies ends it: going on would repeat lines or pass over some.

    Args:
        run_id: The run.
        name: The log.
        tail: Lines to begin with.
        patience: How long the service may be away before the first line.
        url: The service's, for messages.
    """

    def __init__(self, run_id: str, name: str, tail: int, patience: Patience, url: str) -> None:
        self.call = run_calls.log(run_id, name, tail, follow=True)
        self.done = False
        self.pause = 0.0
        self._url = url
        self._attempts: Attempts | None = Attempts(patience)
        self._lines = Lines()

    def opened(self, answer: Answer) -> bool:
        """Take the head of the answer; whether lines follow.

        Raises:
            ServiceProblem: There is no such log.
        """
        if answer.status == 200:
            self._attempts = None
            return True
        self.pause = after_refusal(self._attempts, answer)
        return False

    def take(self, chunk: bytes) -> Iterator[str]:
        """The lines that a piece completes, without their ends."""
        return self._lines.take(chunk)

    def closed(self) -> Iterator[str]:
        """The log is at its end; what stands there without a line end is a line too."""
        self.done = True
        rest = self._lines.rest()
        return iter(() if rest is None else (rest,))

    def lost(self, error: httpx.TransportError) -> None:
        """The connection died, or never was.

        Raises:
            ServiceAway: Lines had come already, or patience is over.
        """
        self.pause = next_pause(self._attempts, away(self._url, error))
