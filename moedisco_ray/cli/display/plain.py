"""Events as lines: words for a log, JSON for programs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from moedisco_ray.cli.display.formatting import count, let_go, percent, stage_progress
from moedisco_ray.core.printable import one_line
from moedisco_ray.core.records.bill import format_seconds
from moedisco_ray.core.records.events import Event, EventType


class JsonLines:
    """Writes each event as one line of JSON."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        self._stream.write(event.to_json() + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Do nothing; the stream stays open."""


class PlainLines:
    """Writes a line per event, but at most one progress line per unit or stage every `interval` seconds."""

    def __init__(self, stream: IO[str], interval: float = 10.0) -> None:
        self._stream = stream
        self._interval = interval
        self._shown: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if event.type in ("progress", "stage_progress", "stage_started") and not self._is_due(event):
            return
        text = describe(event)
        if text:
            clock = time.strftime("%H:%M:%S", time.localtime(event.time))
            self._stream.write(f"{clock}  {one_line(text)}\n")
            self._stream.flush()

    def close(self) -> None:
        """Do nothing; the stream stays open."""

    def _is_due(self, event: Event) -> bool:
        # A stage that is over within the interval needs no line between its start and its end.
        key = event.unit if event.unit is not None else f"stage {event.stage}"
        if event.type != "stage_started" and event.time - self._shown.get(key, float("-inf")) < self._interval:
            return False
        self._shown[key] = event.time
        return True


def describe(event: Event) -> str:
    """Describe an event in one line, without its time; the text is empty for an event that needs no line."""
    line = _LINES.get(event.type)
    return line(event.unit or event.stage or "", event.data) if line is not None else ""


def _progress(unit: str, data: Mapping[str, Any]) -> str:
    loss, speed = data.get("loss", math.nan), count(data.get("tokens_per_second", 0))
    return f"{unit}: step {data.get('step', 0)}/{data.get('steps', 0)}, loss {loss:.4f}, {speed} tokens/s"


def _clusters(_: str, data: Mapping[str, Any]) -> str:
    tokens = data.get("tokens", [])
    shares = ", ".join(percent(part / max(1, sum(tokens))) for part in tokens)
    return f"{len(tokens)} clusters, {count(sum(tokens))} tokens: {shares}"


def _sync(stage: str, data: Mapping[str, Any]) -> str:
    late = f", without {', '.join(data['late'])}" if data.get("late") else ""
    members = len(data.get("members", []))
    return f"{stage}: sync {data.get('sync', 0)}/{data.get('syncs', 0)} of {members} models{late}"


def _finished(_: str, data: Mapping[str, Any]) -> str:
    worse = f"{data['worse_than_start']}; " if data.get("worse_than_start") else ""
    return f"{worse}finished in {format_seconds(data.get('seconds', 0.0))}"


# No line for a failed run: the command itself prints the error.
_LINES: Mapping[EventType, Callable[[str, Mapping[str, Any]], str]] = {
    "run_started": lambda _, data: f"run {data.get('name', '')} in {data.get('directory', '')}",
    "stage_started": lambda stage, _: f"{stage}: started",
    "stage_skipped": lambda stage, data: f"{stage}: reused" + (f" from {data['run']}" if "run" in data else ""),
    "stage_progress": lambda stage, data: f"{stage}: {stage_progress(data)}",
    "stage_finished": lambda stage, data: f"{stage}: finished in {format_seconds(data.get('seconds', 0.0))}",
    "unit_started": lambda unit, data: f"{unit}: {data.get('steps', 0)} steps, {count(data.get('tokens', 0))} tokens",
    "progress": _progress,
    "evaluation": lambda unit, data: (
        f"{unit}: step {data.get('step', 0)}, held-out loss {data.get('held_out_loss', math.nan):.4f}"
    ),
    "unit_finished": lambda unit, data: f"{unit}: finished, loss {data.get('loss', math.nan):.4f}",
    "sync": _sync,
    "unit_let_go": lambda unit, data: f"{unit}: {let_go(data)}",
    "clusters": _clusters,
    "ray_starting": lambda _unit, _data: "starts Ray",
    "nodes_asked": lambda _, data: (
        f"requests nodes for {data['workers']} {data['pool'].replace('_', '-')} workers, needed in "
        f"{format_seconds(data['seconds'])}"
    ),
    "nodes_let_go": lambda _, data: f"no longer requests {data['pool'].replace('_', '-')} nodes",
    "worker_restarted": lambda unit, data: f"{unit}: restarted: {data.get('reason') or 'its worker died'}",
    "warning": lambda _, data: f"warning: {data.get('message', '')}",
    "run_stopped": lambda _, data: f"stopped: {data.get('reason', '')}",
    "run_finished": _finished,
}
