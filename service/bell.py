"""Wakes whoever waits for news of a run.

A writer rings after its transaction is committed; a waiter listens *before* it reads, so that what is written in
between is not slept through.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


class Listener:
    """One coroutine's ear for one run; made by `Bell.listen`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung = asyncio.Event()

    async def wait(self, timeout: float) -> bool:  # noqa: ASYNC109 - a quiet run is no error
        """Wait for a ring since the listening began or the last wait ended.

        Args:
            timeout: Seconds.

        Returns:
            Whether it rang.
        """
        try:
            await asyncio.wait_for(self._rung.wait(), timeout)
        except TimeoutError:
            return False
        self._rung.clear()
        return True

    def wake(self) -> None:
        """From any thread."""
        # A loop that has closed has nobody left to wake.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._rung.set)


class Bell:
    """Rung by threads, heard by coroutines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, set[Listener]] = {}

    def ring(self, run_id: str) -> None:
        """Tell that something of a run was committed; from any thread."""
        with self._lock:
            listeners = list(self._listeners.get(run_id, ()))
        for listener in listeners:
            listener.wake()

    def ring_all(self) -> None:
        """Wake everybody, whatever run they listen for: the service is about to end."""
        with self._lock:
            listeners = [listener for group in self._listeners.values() for listener in group]
        for listener in listeners:
            listener.wake()

    @contextlib.contextmanager
    def listen(self, run_id: str) -> Iterator[Listener]:
        """Hear a run's rings inside the block, those included that fall between two waits."""
        listener = Listener(asyncio.get_running_loop())
        with self._lock:
            self._listeners.setdefault(run_id, set()).add(listener)
        try:
            yield listener
        finally:
            with self._lock:
                group = self._listeners[run_id]
                group.discard(listener)
                if not group:
                    del self._listeners[run_id]

    async def wait(self, run_id: str, timeout: float) -> bool:  # noqa: ASYNC109 - a quiet run is no error
        """Wait for the next ring; one before the call is not heard, for that there is `listen`.

        Args:
            run_id: Whose news.
            timeout: Seconds.

        Returns:
            Whether it rang.
        """
        with self.listen(run_id) as listener:
            return await listener.wait(timeout)
