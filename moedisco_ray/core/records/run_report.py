"""The report of a run in any state: finished, running, stopped, failed, or cut off."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.renamed import read_stored_config
from moedisco_ray.core.errors import DamagedError, RunDirError
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.report import report_of
from moedisco_ray.core.records.run_record import RunReport, RunState
from moedisco_ray.core.store.checksums import checked
from moedisco_ray.core.store.lease import is_leased
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.run_store import RunStore

_ENDS: dict[str, RunState] = {"run_finished": "finished", "run_stopped": "stopped", "run_failed": "failed"}

_NO_RUN = "holds no run; name one that `moedisco run` made: OUTPUT/NAME"


def current_report(location: Location) -> RunReport:
    """The report of a run: the stored one if the run is finished, else one computed from the stages so far.

    Args:
        location: Directory or URI of the run.

    Returns:
        The report, with the run's `state`; `state_reason` is the message of a failed or stopped run.

    Raises:
        ConfigError: The URI cannot be reached.
        DamagedError: A file that the report is made of is damaged.
        RunDirError: The location holds no run, or a run of a version that cannot be read.
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location)
    stored, config = store.read("report.json"), store.read("config.json")
    if stored is None and config is None:
        raise RunDirError("RUN_DIR", str(location), _NO_RUN)
    events = list(EventLog.parse(store.read("events.jsonl") or b""))
    # A report that was copied without its events belongs to a finished run.
    state, reason = run_state(store, events) if events or stored is None else ("finished", None)
    try:
        if state == "finished" and stored is not None:
            report = _stored_report(location, stored)
        else:
            report = report_of(store.read, _checked(location, config or b""))
    except (OSError, json.JSONDecodeError, ValidationError) as error:
        raise RunDirError("RUN_DIR", str(location), "holds a run of another version; show it with that one") from error
    return report.model_copy(update={"state": state, "state_reason": reason})


def _stored_report(location: Location, content: bytes) -> RunReport:
    try:
        return RunReport.model_validate(checked(json.loads(content)))
    except ValidationError:
        raise
    except ValueError as error:
        raise DamagedError(
            "report.json", "", str(location), "run the same command again: it makes the report again"
        ) from error


def stored_run_config(location: Location) -> RunConfig:
    """The configuration of a run.

    Args:
        location: Directory or URI of the run.

    Raises:
        DamagedError: The file with the configuration is damaged.
        RunDirError: The location holds no run, or a run of a version that cannot be read.
    """
    content = RunStore.of(location).read("config.json")
    if content is None:
        raise RunDirError("RUN_DIR", str(location), _NO_RUN)
    return _checked(location, content)


def _checked(location: Location, content: bytes) -> RunConfig:
    try:
        return read_stored_config(content, location)
    except ValidationError as error:
        remedy = f"holds a run of another version ({first_mistake(error.errors())}); show it with that one"
        raise RunDirError("RUN_DIR", str(location), remedy) from error


def run_state(store: RunStore, events: Sequence[Event]) -> tuple[RunState, str | None]:
    """The state of a run, and the message of a failed or stopped run.

    A run is running while a process holds the lock on its event log, or its lease. Otherwise its last event says how it
    ended.

    Args:
        store: The run.
        events: All events of the run.
    """
    if is_leased(store) if store.is_remote else _locked(store.directory / "events.jsonl"):
        return "running", None
    last = next((event for event in reversed(events) if event.type == "run_started" or event.type in _ENDS), None)
    if last is None or last.type == "run_started":
        return "interrupted", None
    return _ENDS[last.type], last.data.get("message") or last.data.get("reason")


def _locked(path: Path) -> bool:
    """Whether a process holds the run's lock (`pipeline.run`)."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
