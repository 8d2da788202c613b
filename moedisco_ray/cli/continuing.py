"""What the same command does after a run that ended early: said at its end, and only where it is true."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from moedisco_ray.core.errors import DiskFullError, RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.stop_file import StopFile


class Continuation:
    """A listener that knows from a run's events what the run has stored.

    Args:
        redo: Whether the run may repeat stages that an earlier attempt has finished.
        stop: The stop file of the run, which ends the next attempt too as long as it exists.
    """

    def __init__(self, redo: bool, stop: StopFile) -> None:
        self._redo = redo
        self._stop = stop
        self._started = False
        self._earlier = False
        self._stage: str | None = None
        self._checkpoint = False

    def __call__(self, event: Event) -> None:
        """Note what an event says of stored work."""
        if event.type == "run_started":
            directory = Path(event.data["directory"])
            self._started = True
            self._earlier = any((directory / stage.directory / "manifest.json").exists() for stage in STAGES)
        elif event.type in ("stage_finished", "stage_skipped"):
            self._stage, self._checkpoint = event.stage, False  # a finished stage's checkpoints are deleted
        elif event.type == "checkpoint":
            self._checkpoint = True

    def close(self) -> None:
        """Nothing has to be closed."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Add what the same command does to whatever interrupts the block: Ctrl-C, a stop, or a full disk."""
        try:
            yield
        except (KeyboardInterrupt, RunStopped, DiskFullError) as error:
            words = self.words()
            if words is not None:
                error.add_note(words)
            raise

    def words(self) -> str | None:
        """What the same command does now, for the end of a sentence; None if that is unknown."""
        if not self._started:
            return None
        subject = "the same command"
        if self._stop.requested:
            subject = f"without the stop file {self._stop.path}, {subject}"
        if self._checkpoint:
            return f"{subject} continues from the last checkpoint"
        if self._stage is not None:
            return f"{subject} continues after the stage {self._stage}"
        if self._earlier:  # by an attempt before this one, which may have had other settings if this one repeats stages
            return None if self._redo else f"{subject} continues from what was stored before"
        return f"nothing is stored yet: {subject} begins anew"
