"""What a driver left in its `events.jsonl`, numbered as the driver numbers it: whole lines that can be read, from 0.

The file is a tenant's: nothing in it, nor anything in its place, can hold up the reconciler.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from moedisco_ray.core.events import Event
from service import run_files
from service.observability import logger
from service.schemas import DriverEvent

_log = logger(__name__)
NAME = "events.jsonl"
BATCH = 5000
BATCH_BYTES = 8 * 2**20
"""A batch is complete once it has as many bytes of lines."""
LONGEST_LINE = 2**20
"""Bytes; a longer line counts as an event that makes no sense."""
MOST_BYTES = 2**30
"""Of the file; what is behind them is not taken in."""
_LEVELS = 32
"""Of lists and sections in one another in an event's data."""


def unread(directory: Path, first: int, batch: int = BATCH) -> Iterator[tuple[int, list[Event]]]:
    """The events from a number on.

    Args:
        directory: The run directory. Where there is no such file, or a link or a pipe in its place, there are no events.
        first: The number wanted next.
        batch: Most events at once.

    Yields:
        The number of the first event, and events.

    Raises:
        OSError: The file exists and cannot be read.
    """
    events: list[Event] = []
    number = size = 0
    for event, length in _whole(directory):
        if number >= first:
            events.append(_checked(event))
            size += length
        number += 1
        if len(events) == batch or size >= BATCH_BYTES:
            yield number - len(events), events
            events, size = [], 0
    if events:
        yield number - len(events), events


def _whole(directory: Path) -> Iterator[tuple[Event, int]]:
    """Events, and the bytes of their lines."""
    try:
        opened = run_files.open_regular(directory, NAME)
    except FileNotFoundError:
        return
    with io.BufferedReader(opened) as file:     # type: ignore[type-var]
        for line in _lines(file):
            try:
                event = _nonsense("a line is too long") if line is None else Event.from_json(line.decode())
            except (ValueError, TypeError, RecursionError):
                continue
            yield event, len(line or "")


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Whole lines; None stands for one that is too long."""
    taken = 0
    long = False
    while piece := file.readline(LONGEST_LINE):
        taken += len(piece)
        if taken > MOST_BYTES:
            _log.warning("%s is larger than %d bytes; what is behind them is not taken in", NAME, MOST_BYTES)
            return
        if piece.endswith(b"\n"):
            yield None if long else piece
            long = False
        elif len(piece) < LONGEST_LINE:
            return  # its driver died while writing it
        else:
            long = True


def _checked(event: Event) -> Event:
    """The event, if a report may hold it; else a warning in its place, since it has a number."""
    if not _is_flat(event.data, _LEVELS):
        return _nonsense(f"an event of type {str(event.type)[:32]!r} is too deep")
    try:
        DriverEvent.model_validate(dataclasses.asdict(event))
    except ValidationError:
        return _nonsense(f"an event of type {str(event.type)[:32]!r} makes no sense")
    return event


def _nonsense(message: str) -> Event:
    return Event("warning", data={"message": message}, time=0.0)


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(child, levels - 1) for child in inner)
