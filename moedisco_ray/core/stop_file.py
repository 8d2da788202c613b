"""Ending a run from outside: a file that, once it exists, stops every trainer at its next step, with a checkpoint.

A file, because it reaches workers on every node that sees the run directory, survives whoever asked, and needs no port.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moedisco_ray.core.errors import RunStopped


@dataclasses.dataclass(frozen=True)
class StopFile:
    """Where to look.

    Attributes:
        path: The file; its text is the reason. None: nobody can ask.
    """

    path: Path | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self.path is not None and self.path.exists()

    def check(self) -> None:
        """End here if somebody asked.

        Raises:
            RunStopped: With the reason that the file gives.
        """
        if self.path is not None and self.path.exists():
            raise RunStopped(self.path.read_text(encoding="utf-8").strip() or "cancelled")

    def request(self, reason: str) -> None:
        """Ask; where nobody looks at a file, nothing happens."""
        if self.path is not None and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(reason + "\n", encoding="utf-8")


NEVER = StopFile()
"""Of a run that nobody ends from outside."""
