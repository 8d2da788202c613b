"""Events as lines: for people who read a log, and for programs."""

from __future__ import annotations

import time
from typing import TextIO

from moedisco_ray.display.state import cluster_sizes
from moedisco_ray.display.words import count, percent
from moedisco_ray.events import Event
from moedisco_ray.report import format_seconds


class JsonLines:
    """Each event as one JSON line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        self._stream.write(event.to_json() + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is left to do."""


class PlainLines:
    """One line per happening; of a unit's progress, at most one line in `interval` seconds."""

    def __init__(self, stream: TextIO, interval: float = 10.0) -> None:
        self._stream = stream
        self._interval = interval
        self._shown: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if event.type == "progress" and not self._is_due(event):
            return
        text = describe(event)
        if text:
            clock = time.strftime("%H:%M:%S", time.localtime(event.time))
            self._stream.write(f"{clock}  {text}\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing is left to do."""

    def _is_due(self, event: Event) -> bool:
        unit = event.unit or event.stage or ""
        if event.time - self._shown.get(unit, float("-inf")) < self._interval:
            return False
        self._shown[unit] = event.time
        return True


def describe(event: Event) -> str:
    """One line about an event, without its time; empty for what needs no line."""
    data, unit = event.data, event.unit or event.stage or ""
    match event.type:
        case "run_started":
            return f"run {data.get('name', '')} in {data.get('directory', '')}"
        case "stage_started":
            return f"{event.stage}: started"
        case "stage_skipped":
            return f"{event.stage}: already there"
        case "stage_finished":
            return f"{event.stage}: finished in {format_seconds(data.get('seconds', 0.0))}"
        case "unit_started":
            return f"{unit}: {data.get('steps', 0)} steps, {count(data.get('tokens', 0))} tokens"
        case "progress":
            return (
                f"{unit}: step {data.get('step', 0)}/{data.get('steps', 0)}, loss {data.get('loss', float('nan')):.4f}, "
                f"{count(data.get('tokens_per_second', 0))} tokens/s")
        case "unit_finished":
            return f"{unit}: finished, loss {data.get('loss', float('nan')):.4f}, {format_seconds(data.get('seconds', 0.0))}"
        case "clusters":
            tokens, _ = cluster_sizes(data)
            shares = ", ".join(percent(part / max(1, sum(tokens))) for part in tokens)
            return f"{len(tokens)} clusters, {count(sum(tokens))} tokens: {shares}"
        case "worker_restarted":
            return f"{unit}: restarted: {data.get('reason') or 'its worker died'}"
        case "warning":
            return f"warning: {data.get('message', '')}"
        case "run_finished":
            return f"finished in {format_seconds(data.get('seconds', 0.0))}"
        case "run_failed":
            return ""  # the command line ends with the error itself
