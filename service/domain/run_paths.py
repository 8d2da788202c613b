"""Ids of runs and paths of their files.

ROOT/RUN_ID/              home of the run, under an output root
├── request.json          configuration that its drivers are started with
├── report-to-ATTEMPT     where the driver of that attempt reports, and the key that it signs with; private
├── stop-ATTEMPT          stop file: asks the driver of that attempt to stop; contains the reason
└── NAME/                 the run directory; see `moedisco_ray.core.store.artifacts`

With `checkpoint.storage`, its checkpoints are in STORAGE/RUN_ID, which only this run uses, and which is deleted with
it. A run at a URI has its run directory at URI/RUN_ID/NAME. Its home is in a directory of the service and holds the
other files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.store.locations import Location, is_uri, joined, parent

ULID_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's base 32, in which ids are written."""
ULID_LENGTH = 26
ULID_PATTERN = "[0-7][0-9A-HJKMNP-TV-Z]{25}"
"""Regular expression of an id."""
_ULID = re.compile(ULID_PATTERN)


def is_id(text: str) -> bool:
    """Whether a text has the form of an id; other texts need no database query."""
    return _ULID.fullmatch(text) is not None


def with_run_directory(config: RunConfig, run_id: str) -> RunConfig:
    """The configuration with the run's own folders: `output` is OUTPUT/RUN_ID, `checkpoint.storage` STORAGE/RUN_ID."""
    changes: dict[str, object] = {"output": joined(config.output, run_id)}
    if config.checkpoint.storage is not None:
        own = str(joined(config.checkpoint.storage, run_id))
        changes["checkpoint"] = config.checkpoint.model_copy(update={"storage": own})
    return config.model_copy(update=changes)


def own_storage(config: Mapping[str, Any], run_id: str) -> str | None:
    """A stored run's own folder in `checkpoint.storage`; None if its checkpoints are in the run directory."""
    section = config.get("checkpoint")
    storage = section.get("storage") if isinstance(section, dict) else None
    return storage if isinstance(storage, str) and parent(storage)[1] == run_id else None


def home_of(location: Location) -> Location:
    """The run's own folder: the parent of the run directory at `location`."""
    return parent(location)[0]


def location_of(output: str, directory: Path) -> Location:
    """Path or URI of a run directory.

    Args:
        output: Setting `output` of the run's stored configuration.
        directory: The run directory on this machine, ROOT/RUN_ID/NAME.
    """
    return joined(output, directory.name) if is_uri(output) else directory


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """Paths of one run.

    Attributes:
        directory: Run directory, ROOT/RUN_ID/NAME.
    """

    directory: Path

    @property
    def home(self) -> Path:
        """The run's own folder on this machine, ROOT/RUN_ID."""
        return self.directory.parent

    @property
    def request(self) -> Path:
        """Configuration for the driver."""
        return self.home / "request.json"

    @property
    def events(self) -> Path:
        """The driver's event log, from which the service recovers events that were not reported."""
        return self.directory / "events.jsonl"

    def report_to(self, attempt: int) -> Path:
        """Address of the service and key for the driver of an attempt, a `ReportAddress`."""
        return self.home / f"report-to-{attempt}"

    def stop_file(self, attempt: int) -> Path:
        return self.home / f"stop-{attempt}"
