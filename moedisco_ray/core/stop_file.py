"""A file whose existence stops every trainer of a run at its next step, with a checkpoint.

A file reaches the workers on all nodes that see the run directory, outlives the process that wrote it, and needs no
port.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moedisco_ray.core.errors import RunStopped


@dataclasses.dataclass(frozen=True)
class StopFile:
    """A file whose existence requests a graceful stop.

    Attributes:
        path: Path of the file, whose text is the reason for the stop; None if the run cannot be stopped by a file.
    """

    path: Path | None = None

    @property
    def requested(self) -> bool:
        return self.path is not None and self.path.exists()

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises:
            RunStopped: A stop was requested; the error has the reason.
        """
        if self.path is not None and self.path.exists():
            raise RunStopped(self.path.read_text(encoding="utf-8").strip() or "cancelled")

    def request(self, reason: str) -> None:
        """Request a stop by writing the file; without a path, do nothing."""
        if self.path is not None and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(reason + "\n", encoding="utf-8")


NEVER = StopFile()
"""The stop file of a run that cannot be stopped from outside."""
