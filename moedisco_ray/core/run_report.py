"""The report of a run in any state: finished, running, stopped, failed, or cut off."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core.artifacts import read_json
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.events import Event, EventLog
from moedisco_ray.core.report import build_report
from moedisco_ray.core.run_record import RunReport, RunState

_ENDS: dict[str, RunState] = {"run_finished": "finished", "run_stopped": "stopped", "run_failed": "failed"}


def current_report(run_dir: Path) -> RunReport:
    """The report of a run directory: the stored report of a finished run, or a new one from the stages so far.

    Returns:
        The report, with `state` and `state_reason`, the message of a failed or stopped run.

    Raises:
        RunDirError: The directory holds no run, or a run of a version that cannot be read.
    """
    stored = run_dir / "report.json"
    if not stored.exists() and not (run_dir / "config.json").exists():
        raise RunDirError("RUN_DIR", str(run_dir), "holds no run; name a directory that `moedisco run` made: OUTPUT/NAME")
    events = EventLog.read(run_dir / "events.jsonl")
    # A report that was copied without its events belongs to a finished run.
    state, reason = run_state(run_dir, events) if events or not stored.exists() else ("finished", None)
    try:
        if state == "finished" and stored.exists():
            report = RunReport.model_validate(read_json(stored))
        else:
            report = build_report(run_dir, _config(run_dir))
    except (OSError, json.JSONDecodeError, ValidationError) as error:
        raise RunDirError("RUN_DIR", str(run_dir), "holds a run of another version; show it with that one") from error
    return report.model_copy(update={"state": state, "state_reason": reason})


def _config(run_dir: Path) -> RunConfig:
    try:
        return stored_config(read_json(run_dir / "config.json"))
    except ValidationError as error:
        remedy = f"holds a run of another version ({first_mistake(error.errors())}); show it with that one"
        raise RunDirError("RUN_DIR", str(run_dir), remedy) from error


def run_state(run_dir: Path, events: Sequence[Event]) -> tuple[RunState, str | None]:
    """The state of a run, from the lock on its event log and its last event.

    Args:
        run_dir: The run directory.
        events: All events of the run.
    """
    if _locked(run_dir / "events.jsonl"):
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
