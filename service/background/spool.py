"""Reads the events in a driver's `events.jsonl`, numbered from 0 as the driver numbers them.

A tenant can write anything to that path, so nothing there may block or break the reconciler.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from pydantic import ValidationError

from moedisco_ray.core.records.events import Event, events_in
from service.observability import logger
from service.run_storage import RunStorage, StoredFile
from service.schemas import DriverEvent

_log = logger(__name__)
NAME = "events.jsonl"
BATCH = 5000
"""Maximum number of events per batch."""
BATCH_BYTES = 8 * 2**20
"""Total size of lines at which a batch is complete even if it has fewer than `BATCH` events (bytes)."""
LONGEST_LINE = 2**20
"""Maximum length of a line (bytes); a longer line counts as an invalid event."""
MOST_BYTES = 2**30
"""Number of bytes of the file after which reading stops."""
_LEVELS = 32
"""Maximum nesting depth of an event's data."""


def unread(storage: RunStorage, first: int, batch: int = BATCH) -> Iterator[tuple[int, list[Event]]]:
    """Read the events from a given number on, in batches.

    Args:
        storage: Files of the run. If the event log is absent, a symbolic link or a pipe, there are no events.
        first: Number of the first event to read.
        batch: Maximum number of events per batch.

    Yields:
        The number of the batch's first event, and the events.

    Raises:
        OSError: The file exists but cannot be read.
    """
    events: list[Event] = []
    number = size = 0
    for event, length in _whole(storage):
        if number >= first:
            events.append(_checked(event))
            size += length
        number += 1
        if len(events) == batch or size >= BATCH_BYTES:
            yield number - len(events), events
            events, size = [], 0
    if events:
        yield number - len(events), events


def _whole(storage: RunStorage) -> Iterator[tuple[Event, int]]:
    """Read every event of the file, with the length of its line (bytes)."""
    try:
        opened = storage.open(NAME)
    except FileNotFoundError:
        return
    with io.BufferedReader(_Sequential(opened)) as file:
        for line in _lines(file):
            try:
                found = [_nonsense("a line is too long")] if line is None else list(events_in([line]))
            except RecursionError:
                continue
            for event in found:
                yield event, len(line or "")


class _Sequential(io.RawIOBase):
    """A binary stream over a stored file, from start to end."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read_at(self._place, len(buffer))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Read the complete lines of a file; a line that is too long becomes None."""
    taken = 0
    long = False
    while piece := file.readline(LONGEST_LINE):
        taken += len(piece)
        if taken > MOST_BYTES:
            _log.warning("%s is larger than %d bytes; the rest of it is not read", NAME, MOST_BYTES)
            return
        if piece.endswith(b"\n"):
            yield None if long else piece
            long = False
        elif len(piece) < LONGEST_LINE:
            return  # the driver died while it wrote the line
        else:
            long = True


def _checked(event: Event) -> Event:
    """The event itself if it is valid, otherwise a `warning` event that replaces it, so that the numbering stays."""
    if not _is_flat(event.data, _LEVELS):
        return _nonsense(f"an event of type {str(event.type)[:32]!r} is nested too deeply")
    try:
        DriverEvent.model_validate(dataclasses.asdict(event))
    except ValidationError:
        return _nonsense(f"an event of type {str(event.type)[:32]!r} is not valid")
    return event


def _nonsense(message: str) -> Event:
    return Event("warning", data={"message": message}, time=0.0)


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(child, levels - 1) for child in inner)
