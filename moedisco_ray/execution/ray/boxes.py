"""The events that a run's mailbox holds until the driver has stored them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

from moedisco_ray.core.records.events import Event

MOST_AT_ONCE = 500
"""Maximum number of events in one message. While a run has no driver, hundreds of thousands may come."""


class Boxes:
    """Events by box, in order. Several threads may use this object."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: defaultdict[str, list[Event]] = defaultdict(list)
        self._woken: set[str] = set()

    def put(self, box: str, event: Event) -> None:
        with self._changed:
            self._events[box].append(event)
            self._changed.notify_all()

    def first(self, box: str, events: Sequence[Event]) -> None:
        """Put events before all others of a box."""
        with self._changed:
            if events:
                self._events[box][:0] = events

    def wake(self, box: str) -> None:
        """Let a wait for the next event of a box end without one."""
        with self._changed:
            self._woken.add(box)
            self._changed.notify_all()

    def wait(self, box: str, seconds: float) -> list[Event]:
        """The first events of a box, once there is one; none if none comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: box in self._events or box in self._woken, seconds)
            self._woken.discard(box)
            return self._events.get(box, [])[:MOST_AT_ONCE]

    def drop(self, box: str, count: int) -> list[Event]:
        """Remove the first events of a box, and return them."""
        with self._changed:
            events = self._events.pop(box, [])
            if events[count:]:
                self._events[box] = events[count:]
            return events[:count]

    def all(self, box: str) -> list[Event]:
        with self._changed:
            return list(self._events.get(box, []))
