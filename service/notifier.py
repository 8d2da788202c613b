"""Wakes coroutines that wait for changes of a run.

A writer notifies after its transaction is committed. A reader subscribes *before* it reads the database, so that it
misses no change in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


class Subscription:
    """One coroutine's subscription to one run; made by `Notifier.subscribe`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._notified = asyncio.Event()

    async def wait(self, timeout: float) -> bool:  # noqa: ASYNC109 - a quiet run is no error
        """Wait at most `timeout` seconds for a notification.

        Returns whether one came since the last wait, or since the subscription.
        """
        try:
            await asyncio.wait_for(self._notified.wait(), timeout)
        except TimeoutError:
            return False
        self._notified.clear()
        return True

    def wake(self) -> None:
        """Wake the waiting coroutine; safe from any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has closed, so no coroutine waits
            self._loop.call_soon_threadsafe(self._notified.set)


class Notifier:
    """Wakes waiting coroutines from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: dict[str, set[Subscription]] = {}

    def notify(self, run_id: str) -> None:
        """Wake the subscribers of a run after a change was committed; safe from any thread."""
        with self._lock:
            subscriptions = list(self._subscriptions.get(run_id, ()))
        for subscription in subscriptions:
            subscription.wake()

    def notify_all(self) -> None:
        """Wake the subscribers of every run when the service shuts down."""
        with self._lock:
            subscriptions = [subscription for group in self._subscriptions.values() for subscription in group]
        for subscription in subscriptions:
            subscription.wake()

    @contextlib.contextmanager
    def subscribe(self, run_id: str) -> Iterator[Subscription]:
        """Receive a run's notifications inside the block, including those between two waits."""
        subscription = Subscription(asyncio.get_running_loop())
        with self._lock:
            self._subscriptions.setdefault(run_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            with self._lock:
                group = self._subscriptions[run_id]
                group.discard(subscription)
                if not group:
                    del self._subscriptions[run_id]
