"""Measures and removes the files of runs, and deletes old idempotency keys and browser sessions."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from moedisco_ray.core.store.locations import Location, is_uri, parent
from service import run_homes
from service.background import dataset_files
from service.background.isolation import isolated
from service.database import audit, idempotency, policies, runs, sessions, sharers
from service.database.session import Database
from service.database.tables import RunRow
from service.dataset_store import DatasetStore
from service.domain.jobs import submission_id
from service.domain.path_sandbox import Roots
from service.domain.retention import Due, FinishedRun, announced, due_runs
from service.domain.run_paths import RunPaths, home_of
from service.domain.states import TERMINAL, RunState
from service.errors import RayUnavailable
from service.observability import logger
from service.ray_side.jobs import RayJobs
from service.run_storage import folder_bytes, run_folders, stored_bytes

_log = logger(__name__)
SWEEP_SECONDS = 3600.0
"""Interval at which storage roots are searched for left checkpoints, in seconds: each time, all of their files are
listed."""
ORPHAN_SECONDS = 24 * 3600.0
"""Time without a change after which checkpoints of a deleted run are deleted, in seconds."""


class Housekeeping:
    """Maintenance that runs every few minutes.

    Args:
        jobs: Client for Ray Jobs; the jobs of removed runs are deleted.
        roots: Allowed directories and URIs; files are removed only in the output roots and in the directories that hold
            the runs.
        idle: Time without use after which a browser session ends, in seconds.
    """

    def __init__(self, database: Database, jobs: RayJobs, roots: Roots, idle: float) -> None:
        self._database = database
        self._jobs = jobs
        self._roots = roots
        self._idle = idle
        self._swept = float("-inf")

    def round(self, now: float) -> None:
        """Measure run directories, remove expired runs and left uploads, and delete expired keys and sessions.

        Raises:
            DatabaseUnavailable: The database does not answer; the next round tries again.
        """
        with self._database.write() as session:
            idempotency.purge(session, now)
        with self._database.write() as session:
            sessions.purge(session, idle=self._idle, now=now)
        try:
            dataset_files.tidy(self._database, DatasetStore(self._roots.homes[0]), now)
        except OSError as error:
            _log.warning("files of data sets remain: %s", error)
        self._measure(now)
        for path in run_homes.left_aside(self._roots.homes, self._known):
            self._remove_files(path, run_homes.run_of(path))
        for run, due in self._announce(now):
            isolated(self._database, run, "removed", functools.partial(self._remove, run.id, due, now))
        if not 0 <= now - self._swept < SWEEP_SECONDS:
            self._swept = now
            for root in self._roots.storage:
                self._sweep(root, now)

    def _measure(self, now: float) -> None:
        with self._database.read() as session:
            found = sharers.unmeasured(session)
        for run in found:
            isolated(self._database, run, "measured", functools.partial(self._measure_run, run, now))

    def _measure_run(self, run: RunRow, now: float) -> None:
        try:
            if run.storage is not None and run.state == RunState.SUCCEEDED:  # never resumed
                run_homes.remove_storage(run.storage, run.id, self._roots.storage)
            size, shares = stored_bytes(Path(run.directory), run.location)
            size += 0 if run.storage is None else folder_bytes(run.storage)
        except OSError as error:
            _log.warning("run %s cannot be measured: %s", run.id, error)
            return
        with self._database.write() as session:
            sharers.measured(session, run.id, size, shares, now)

    def _announce(self, now: float) -> list[tuple[RunRow, Due]]:
        """Store and announce new expiry times; returns the runs that have expired."""
        with self._database.read() as session:
            changes, expired = _expiries(session, now)
        for run, due, time in changes:
            isolated(self._database, run, "announced", functools.partial(self._announce_run, run.id, due, time, now))
        return expired

    def _announce_run(self, run_id: str, due: Due | None, time: float | None, now: float) -> None:
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            if run is None or run.state not in TERMINAL or run.kept:
                return
            runs.amend(session, run, now=now, expires_at=time)
            if due is not None:
                audit.note(
                    session,
                    owner="service",
                    token_id=None,
                    action="run.expiring",
                    target=run_id,
                    address=None,
                    now=now,
                    detail={"name": run.name, "owner": run.owner, "expires_at": time, "why": due.why},
                )

    def _remove(self, run_id: str, due: Due, now: float) -> None:
        try:
            self._remove_run(run_id, due, now)
        except OSError as error:
            _log.warning("run %s cannot be removed: %s", run_id, error)

    def _remove_run(self, run_id: str, due: Due, now: float) -> None:
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            gone = (
                run is None or run.state not in TERMINAL or run.kept or run.expires_at is None or run.expires_at > now
            )
            if run is None or gone or run_id in runs.starts(session, run_id):
                return
            audit.note(
                session,
                owner="service",
                token_id=None,
                action="run.removed",
                target=run_id,
                address=None,
                now=now,
                detail={
                    "name": run.name,
                    "owner": run.owner,
                    "why": due.why,
                    "ended": run.ended,
                    "disk_bytes": sharers.sizes(session, [run])[run.id],
                    **audit.storage_detail(run.storage),
                },
            )
            attempts, storage = run.attempt, run.storage
            home = RunPaths(Path(run.directory)).home
            other, place = runs.inside(session, home, run_id), home_of(run.location)
            run_homes.check_deletable(place, run_id, self._roots.output_buckets)
            runs.delete(session, run)
            # Move the files last, because that cannot be undone: if it fails, the transaction is rolled back.
            aside = run_homes.set_aside(home, run_id, self._roots.homes, other)
        _log.info("run %s removed: %s", run_id, due.why)
        self._remove_files(aside, run_id, place)
        if storage is not None:
            self._remove_storage(storage, run_id)
        with contextlib.suppress(RayUnavailable):
            for attempt in range(1, attempts + 1):
                self._jobs.delete(submission_id(run_id, attempt))

    def _sweep(self, root: Location, now: float) -> None:
        """Delete checkpoints of deleted runs, and record folders named like runs that this service does not know."""
        for folder, modified in self._folders(root).items():
            run_id = parent(folder)[1]
            if now - modified < ORPHAN_SECONDS or self._known(run_id):
                continue
            with self._database.read() as session:
                ours, named = audit.mentions(session, run_id), audit.mentions(session, folder)
            if not ours and not named:
                _log.warning(
                    "%s belongs to no run of this service; delete it by hand if no other service uses it", folder
                )
                # The target is the folder: an entry about the run would make it a run of this service.
                self._note(
                    "checkpoints.unknown",
                    folder,
                    now,
                    {"why": "belongs to no run of this service", "modified": modified},
                )
            elif ours and self._remove_storage(folder, run_id):
                self._note("checkpoints.removed", run_id, now, {"folder": folder})

    def _folders(self, root: Location) -> dict[str, float]:
        """Folders of runs below a storage root, with their modification times.

        Where the plain root does not answer, the options of runs' URIs are tried.
        """
        with self._database.read() as session:
            storages = [*runs.storages(session), *audit.storages(session)] if is_uri(root) else []
        options = sorted({storage.partition("?")[2] for storage in storages if storage.startswith(f"{root}/")} - {""})
        error: OSError | None = None
        for place in (root, *(f"{root}?{option}" for option in options)):
            try:
                return run_folders(place)
            except OSError as failure:
                error = error or failure
        _log.warning("storage root %s cannot be searched for left checkpoints: %s", root, error)
        return {}

    def _note(self, action: str, target: str, now: float, detail: dict[str, Any]) -> None:
        with self._database.write() as session:
            audit.note(
                session,
                owner="service",
                token_id=None,
                action=action,
                target=target,
                address=None,
                now=now,
                detail=detail,
            )

    def _remove_storage(self, storage: str, run_id: str) -> bool:
        try:
            run_homes.remove_storage(storage, run_id, self._roots.storage)
        except OSError as error:
            _log.warning("checkpoints of run %s remain until the next sweep: %s", run_id, error)
            return False
        return True

    def _known(self, run_id: str) -> bool:
        with self._database.read() as session:
            return runs.get(session, run_id) is not None

    def _remove_files(self, aside: Path | None, run_id: str, place: Location = Path()) -> None:
        try:
            run_homes.remove_run(aside, run_id, place, self._roots.output_buckets)
        except OSError as error:
            _log.warning("files of run %s remain: %s", run_id, error)


def _expiries(
    session: Session, now: float
) -> tuple[list[tuple[RunRow, Due | None, float | None]], list[tuple[RunRow, Due]]]:
    """Compute the changed expiry times of runs, and the runs that have expired."""
    named, rules = runs.starts(session), policies.load(session)
    by_owner: dict[str, list[RunRow]] = defaultdict(list)
    for run in runs.finished(session):
        by_owner[run.owner].append(run)
    changes: list[tuple[RunRow, Due | None, float | None]] = []
    expired: list[tuple[RunRow, Due]] = []
    for owner, theirs in by_owner.items():
        due_of = due_runs(
            [FinishedRun(run.id, run.ended or run.updated, run.kept) for run in theirs], rules.of(owner).retention
        )
        for run in theirs:
            due = None if run.id in named else due_of.get(run.id)
            time = announced(None if due is None else due.time, run.expires_at, now)
            if due is not None and time is not None and time <= now:
                expired.append((run, due))
            elif time != run.expires_at:
                changes.append((run, due, time))
    return changes, expired
