"""Where a run's files lie.

ROOT/RUN_ID/              the run's own directory under one of the service's roots
├── request.json          the configuration its drivers are started with
├── stop-ATTEMPT          its presence asks that attempt's driver to end; its content says why
└── NAME/                 the run directory; see `moedisco_ray.core.artifacts`
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from moedisco_ray.core.config import RunConfig

ULID_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's base 32, in which ids are written."""
ULID_LENGTH = 26
ULID_PATTERN = "[0-7][0-9A-HJKMNP-TV-Z]{25}"
"""Regular expression of an id."""
_ULID = re.compile(ULID_PATTERN)


def is_id(text: str) -> bool:
    """Whether a text has the form of an id; no other text needs to be looked up."""
    return _ULID.fullmatch(text) is not None


def with_run_directory(config: RunConfig, root: Path, run_id: str) -> RunConfig:
    """The configuration with `output` set to the run's own directory under a root, so that no two runs meet."""
    return config.model_copy(update={"output": root / run_id})


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """Paths of one run.

    Attributes:
        directory: The run directory, ROOT/RUN_ID/NAME.
    """

    directory: Path

    @property
    def home(self) -> Path:
        """ROOT/RUN_ID: holds everything of the run."""
        return self.directory.parent

    @property
    def request(self) -> Path:
        """The configuration for the driver."""
        return self.home / "request.json"

    @property
    def events(self) -> Path:
        """The driver's events, which are also the spool of what it reports."""
        return self.directory / "events.jsonl"

    def stop_file(self, attempt: int) -> Path:
        """What asks the driver of an attempt to end."""
        return self.home / f"stop-{attempt}"
