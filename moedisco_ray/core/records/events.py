"""The events of a run: one flat record each, appended to `events.jsonl`.

Every consumer (terminal view, plain lines, JSON, trackers, the report) reads this one stream. The bill is computed from
it, so each line ends with a checksum: `{"type": ..., "time": 1.5, "crc": "1c291ca3"}`, the CRC-32 of the line without
it. Lines without a checksum are accepted: a single flipped bit leaves no such line.
"""

from __future__ import annotations

import dataclasses
import io
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

EventType = Literal[
    "run_started",  # id, name, directory, stages, ways: those that the plan has compared
    "ray_starting",  # a Ray cluster starts on this machine
    "stage_started",  # stage
    # stage, run, offer: its artifact already exists, or was taken from the run with this name, which has this place
    "stage_skipped",  # among the runs that were offered, from 0
    # stage, done, total (null: unknown), unit: what is counted, in the plural; emitted at most once a second
    "stage_progress",
    "stage_finished",  # stage, seconds, summary
    "unit_started",  # stage, unit, steps, tokens, workers, node, pid
    "progress",  # stage, unit, step, steps, tokens, loss, lr, grad_norm, tokens_per_second, mfu; of an MoE also
    # largest_load (in any layer; 1: balanced) and dead_experts, in the last batch
    # stage, unit, step, stall (seconds for which training stood still), latency (seconds until it was stored)
    "checkpoint",
    "evaluation",  # stage, unit, step, tokens, held_out_loss: held-out loss during training
    "unit_finished",  # stage, unit, steps, tokens, loss, seconds, restored_step
    "unit_let_go",  # stage, unit, contribution, steps, tokens, reason: the merge does not wait for this sub-model
    "sync",  # stage, sync, syncs, members, late, seconds: the weights of these members were combined
    "clusters",  # documents, tokens: one number per cluster
    "worker_restarted",  # stage, unit, reason
    # hold, pool, workers, unit, price_per_hour: workers took slots of a pool, and pay this price (dollars per
    "workers_held",
    # worker-hour) until they release them; unit: the training, if any; until: when they released them, if that was
    # before the event could be stored
    "workers_released",  # hold
    "slots_free",  # pool, slots, price_per_hour: number of slots that exist and that no worker holds, from now on
    "nodes_asked",  # pool, workers, seconds: nodes for these workers are requested, and needed after these seconds
    "nodes_let_go",  # pool: nodes of this pool are no longer requested
    "heartbeat",  # emitted every few seconds: the run is alive, and its workers still hold their slots
    "warning",  # message
    # seconds, bill (its totals: `BILL_FIGURES`); a run that ended worse than its start has worse_than_start,
    "run_finished",
    # a sentence that says so
    "run_failed",  # message, error: its class, field: the setting that it is about
    "run_stopped",  # reason
    "state",  # state, reason, attempt: added by the control service to the stream that it serves
]


BILL_FIGURES = ("dollars", "dollars_with_idle", "seconds")
"""Totals of the bill in a run's last event, for trackers. The saving is not among them: it must be shown with its
verdict."""


@dataclasses.dataclass(frozen=True)
class Event:
    """An event. `unit` names a part of a stage with its own progress, such as `submodel-3`."""

    type: EventType
    stage: str | None = None
    unit: str | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    time: float = dataclasses.field(default_factory=time.time)

    def to_json(self) -> str:
        """The event as one JSON line, without a trailing newline."""
        return json.dumps(dataclasses.asdict(self), allow_nan=True, separators=(",", ":"))

    @property
    def line(self) -> str:
        """The event as a line of `events.jsonl`, without a trailing newline."""
        text = self.to_json()
        return f'{text[:-1]}{_MARK}{zlib.crc32(text.encode()):08x}"}}'

    @classmethod
    def from_line(cls, line: bytes) -> Event:
        """The event in a line of `events.jsonl`.

        Raises:
            DamagedLineError: The line is complete, but it is not what was written.
            ValueError: The line is no event, such as the beginning of one, which a killed process left.
        """
        text, mark, checksum = line.decode(errors="replace").rstrip().rpartition(_MARK)
        text = f"{text}}}" if mark else checksum
        try:
            found = cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise (DamagedLineError if line.rstrip().endswith(b'"}') else ValueError)(str(error)) from error
        if mark and checksum != f'{zlib.crc32(text.encode()):08x}"}}':
            raise DamagedLineError("wrong checksum")
        return found


_MARK = ',"crc":"'
"""Text before the checksum of a line; inside a JSON text, its quotation marks would be escaped."""
LOST = Event("heartbeat", time=0.0)
"""Takes the place of an event whose line is damaged, so that the numbers of later events stay."""


class DamagedLineError(ValueError):
    """A line of `events.jsonl` is not what was written."""


def events_in(lines: Iterable[bytes]) -> Iterator[Event]:
    """The events in complete lines of `events.jsonl`: `LOST` for damaged ones, none for what killed processes left."""
    for line in lines:
        try:
            yield Event.from_line(line)
        except DamagedLineError:
            yield LOST
        except ValueError:
            continue


def without_damage(content: bytes) -> bytes:
    """The content of `events.jsonl` with `LOST` in place of damaged lines, which keep their length and line number."""
    lost = LOST.line.encode()
    return b"".join(line if _is_intact(line) else lost.ljust(len(line) - 1) + b"\n" for line in io.BytesIO(content))


def _is_intact(line: bytes) -> bool:
    return not line.endswith(b"\n") or not any(event is LOST for event in events_in([line]))


Emit = Callable[[Event], None]
"""A listener: a function that receives each event. It must be fast and must not raise."""


def discard(event: Event) -> None:
    """An `Emit` that ignores the event."""
    del event


Advance = Callable[[int], None]
"""Function that receives the amount of work done since its last call, such as `StageProgress.add`."""


def no_advance(count: int) -> None:
    """An `Advance` that ignores the progress."""
    del count


def _unchanged(event: Event) -> Event:
    return event


class StageProgress:
    """Counts what a stage does and emits `stage_progress` events, at most one a second.

    Args:
        unit: Plural noun for the things that are counted, such as `documents`.
        total: Count that the stage will reach; None if it is unknown.
    """

    _INTERVAL = 1.0

    def __init__(
        self, emit: Emit, stage: str, unit: str, total: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._emit, self._stage, self._unit, self._total, self._clock = emit, stage, unit, total, clock
        self._done = 0
        self._emitted = float("-inf")

    def add(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if count and now - self._emitted >= self._INTERVAL:
            self._emitted = now
            self._emit(
                Event(
                    "stage_progress", self._stage, data={"done": self._done, "total": self._total, "unit": self._unit}
                )
            )


class EventLog:
    """Appends events to a file and hands each to the listeners, in order.

    If the last line is incomplete because the process was killed while writing, it is terminated before anything is
    appended. So each kill leaves at most one unreadable line, which `read` skips.

    Args:
        path: The file.
        listeners: Receive each event after it is on disk.
        complete: Adds to an event what only the driver knows, such as a price.
    """

    def __init__(
        self, path: Path, listeners: tuple[Emit, ...] = (), complete: Callable[[Event], Event] = _unchanged
    ) -> None:
        # Events come from the pipeline, the event mailbox and the heartbeat, each in a thread of its own.
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
        self._listeners = list(listeners)
        self._complete = complete

    def __call__(self, event: Event) -> None:
        """Append an event; it is on disk before a listener receives it."""
        event = self._complete(event)
        with self._lock:
            self._file.write(event.line + "\n")
            self._file.flush()
            for listener in self._listeners:
                listener(event)

    def listen(self, listener: Emit) -> None:
        self._listeners.append(listener)

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[Event]:
        """All complete events of a file, oldest first; empty if the file does not exist."""
        return list(EventLog.parse(path.read_bytes())) if path.exists() else []

    @staticmethod
    def parse(content: bytes) -> Iterator[Event]:
        """All complete events in a file's content, oldest first, one at a time: those of a long run take a gigabyte."""
        return (event for event in events_in(io.BytesIO(content)) if event != LOST)  # shares the memory of `content`
