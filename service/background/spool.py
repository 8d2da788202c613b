"""What a driver left in its `events.jsonl`, numbered as the driver numbers it: whole lines that can be read, from 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.events import Event
from service.schemas import DriverEvent

BATCH = 5000


def unread(path: Path, first: int, batch: int = BATCH) -> Iterator[tuple[int, list[Event]]]:
    """The events from a number on.

    Args:
        path: The file; an absent one has none.
        first: The number wanted next.
        batch: Most events at once.

    Yields:
        The number of the first event, and events.

    Raises:
        OSError: The file is there and cannot be read.
    """
    events: list[Event] = []
    number = 0
    for event in _whole(path):
        if number >= first:
            events.append(_checked(event))
        number += 1
        if len(events) == batch:
            yield number - batch, events
            events = []
    if events:
        yield number - len(events), events


def _whole(path: Path) -> Iterator[Event]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return  # its driver died while writing it
            try:
                yield Event.from_json(line.decode())
            except (ValueError, TypeError):
                continue


def _checked(event: Event) -> Event:
    """The event, if a report may hold it; else a warning in its place, since it has a number."""
    try:
        DriverEvent.model_validate(dataclasses.asdict(event))
    except ValidationError:
        return Event("warning", data={"message": f"an event of type {str(event.type)[:32]!r} makes no sense"}, time=0.0)
    return event
