"""Heartbeat events while workers are held, which keep the bill up to date within seconds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from moedisco_ray.core.records.events import Event, EventLog

INTERVAL = 5.0
"""Seconds between two heartbeats. Bills are precise to this time."""


@contextlib.contextmanager
def heartbeats(log: EventLog, interval: float = INTERVAL) -> Iterator[None]:
    """Write `heartbeat` events inside the block, whenever a pool's workers are held.

    A heartbeat that cannot be written, for example on a full disk, is skipped: the run's next own event fails in the
    same way and ends the run.
    """
    held: set[str] = set()
    stopped = threading.Event()

    def listen(event: Event) -> None:
        if event.type == "workers_held":
            held.add(event.data["hold"])
        elif event.type == "workers_released":
            held.discard(event.data["hold"])

    def beat() -> None:
        while not stopped.wait(interval):
            if held:
                with contextlib.suppress(OSError):
                    log(Event("heartbeat"))

    log.listen(listen)
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
