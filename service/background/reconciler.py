"""Reconciles the runs in the database with the jobs in Ray.

A round loads the runs, asks Ray, decides and applies; one thread runs the rounds one after the other. Every step is
idempotent and depends only on the database and Ray, so the next round completes a round that was interrupted.

queued ─► starting       one transaction: attempt + 1
starting                 the job is submitted, again in each round until Ray lists it
driver alive             where it reports is written again if the service's address has changed
stopping                 the stop file is written if it is missing; if it cannot be, the run still ends with its driver
job ended or unknown     events that the driver left in events.jsonl are stored; then the next state is decided
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.locations import Location
from service.background import observed, spool
from service.background.isolation import isolated
from service.background.launching import Launcher
from service.database import ingest, quotas, reuse, runs
from service.database.quotas import Quotas
from service.database.session import Database
from service.database.tables import RunRow
from service.domain.admission import Admission, ClusterCapacity, admit
from service.domain.jobs import JobState, submission_id, submitted_run
from service.domain.outcome import REASON_LENGTH, STOP_REASONS, Outcome, decide_outcome
from service.domain.states import ACTIVE, TERMINAL, RunState
from service.errors import DatabaseError, RayUnavailable, UnusableRun
from service.notifier import Notifier
from service.observability import logger
from service.ray_side.jobs import RayJobs
from service.ray_side.pools import RayPools
from service.run_storage import storage_of
from service.settings import Settings

_log = logger(__name__)
RAY_AWAY = "Ray does not answer"
T = TypeVar("T")
POOLS_SECONDS = 3.0
"""Maximum age of the cached slot counts of the pools, in seconds. Ray updates them every five seconds."""


class Reconciler:
    """Supervises all runs: starts and stops their drivers, and updates their states.

    Args:
        notifier: Notified of every committed change of a run.
        secret: Secret from which the drivers' keys are derived.
    """

    def __init__(
        self,
        database: Database,
        jobs: RayJobs,
        pools: RayPools,
        notifier: Notifier,
        *,
        settings: Settings,
        secret: bytes,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._pools = pools
        self._notifier = notifier
        self._launcher = Launcher(jobs, settings, secret, self._location_of, self._offers_of)
        self._most_active = settings.max_active_runs
        self._unreadable: list[str] = []
        self._last_look: tuple[float, frozenset[str], ClusterCapacity | None] = (float("-inf"), frozenset(), None)

    def round(self, now: float) -> None:
        """Supervise all runs once.

        Raises:
            DatabaseUnavailable: The database does not answer; the next round tries again.
        """
        try:
            jobs = self._jobs.statuses()
        except RayUnavailable as error:
            _log.debug("no jobs: %s", error)
            jobs = None
        known = self._quotas(now)
        for run in self._runs(*ACTIVE):
            done = isolated(
                self._database, run, "supervised", functools.partial(self._supervise, run, jobs, known, now)
            )
            if not done and run.state == RunState.STOPPING:
                isolated(self._database, run, "ended", functools.partial(self._end, run, jobs, now))
        if jobs is not None:
            self._end_orphans(jobs)
        self._admit(known, now, connected=jobs is not None)

    def _supervise(self, run: RunRow, jobs: Mapping[str, JobState] | None, known: Quotas, now: float) -> None:
        try:
            self._reconcile(run, jobs, known, now)
        except UnusableRun as error:
            self._refuse_unusable(run.id, str(error), now)
        except OSError as error:
            self._explain(run.id, _unusable(error), now)

    def _reconcile(self, run: RunRow, jobs: Mapping[str, JobState] | None, known: Quotas, now: float) -> None:
        stopping = run.state == RunState.STOPPING
        if stopping:
            self._request_stop(run, now)
        else:
            run.check_readable()  # a run that cannot be metered must not spend money
            if observed.stop_for_money(run, known):
                self._stop_for_money(run.id, known, now)
                return
        job = None if jobs is None else jobs.get(submission_id(run.id, run.attempt))
        if jobs is None or (job is not None and not job.phase.ended):
            self._publish_address(run)
        if jobs is None:
            if not stopping:
                self._explain(run.id, RAY_AWAY, now)
            return
        if job is None or job.phase.ended:
            # A killed run waits for nothing: it ends even if its last events cannot be read. So does one that cannot be
            # metered.
            with contextlib.suppress(
                *((OSError,) if run.stop == "killed" else ()), *((UnusableRun,) if stopping else ())
            ):
                self._ingest_spool(run, now)
        self._apply(run.id, run.attempt, job, now)

    def _apply(self, run_id: str, attempt: int, job: JobState | None, now: float) -> None:
        with self._database.read() as session:
            run = runs.get(session, run_id)
            if run is None or run.attempt != attempt:
                return
            outcome = decide_outcome(observed.observed_state(run, now), job, now)
        if outcome.state is not None:
            outcome = self._store_outcome(run_id, attempt, job, now)
        elif run.reason == RAY_AWAY:
            self._explain(run_id, None, now)
        if outcome.submit:
            self._launch(run, now)
        if outcome.kill:
            try:
                self._jobs.kill(submission_id(run_id, attempt))
            except RayUnavailable as error:
                _log.info("to be repeated: %s", error)

    def _launch(self, run: RunRow, now: float) -> None:
        """Start the driver of the current attempt; the run fails if its paths are no longer allowed."""
        try:
            self._launcher.launch(run)
        except RayUnavailable as error:
            _log.info("to be repeated: %s", error)
        except ConfigError as error:
            self._refuse(run.id, run.attempt, str(error)[:REASON_LENGTH], now)

    def _refuse(self, run_id: str, attempt: int, reason: str, now: float) -> None:
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            if run is None or run.attempt != attempt or run.state != RunState.STARTING:
                return
            runs.transition(session, run, RunState.FAILED, reason=reason, now=now)
        _log.info("failed: %s", reason)
        self._notifier.notify(run_id)

    def _publish_address(self, run: RunRow) -> None:
        try:
            self._launcher.publish_address(run)
        except (ConfigError, OSError) as error:  # until then, the driver keeps its events
            _log.info("to be repeated: %s", error)

    def _request_stop(self, run: RunRow, now: float) -> None:
        try:
            self._launcher.request_stop(run)
        except ConfigError as error:  # the run ends anyway
            self._explain(run.id, str(error)[:REASON_LENGTH], now)
        except OSError as error:  # the driver may end nevertheless, and can be killed
            self._explain(run.id, _unusable(error), now)

    def _store_outcome(self, run_id: str, attempt: int, job: JobState | None, now: float) -> Outcome:
        """Lock the run, decide on its outcome again, and store the outcome in the same transaction."""
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            if run is None or run.attempt != attempt:
                return Outcome()
            outcome = decide_outcome(observed.observed_state(run, now), job, now)
            if outcome.state is not None:
                runs.transition(session, run, outcome.state, reason=outcome.reason, now=now, futile=outcome.futile)
        _log.info("%s: %s", outcome.state, outcome.reason)
        self._notifier.notify(run_id)
        return outcome

    def _ingest_spool(self, run: RunRow, now: float) -> None:
        """Store the events that the driver logged but did not report."""
        for first, events in spool.unread(storage_of(run.location), run.next_seq):
            with self._database.write() as session:
                row = runs.lock(session, run.id)
                if row is None:
                    return
                ingest.take(session, row, first, events, now)
            self._notifier.notify(run.id)

    def _stop_for_money(self, run_id: str, known: Quotas, now: float) -> None:
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            if run is None or run.state not in (RunState.STARTING, RunState.RUNNING):
                return
            stop = observed.stop_for_money(run, known)
            if stop is None:
                return
            runs.transition(session, run, RunState.STOPPING, reason=STOP_REASONS[stop], now=now, stop=stop)
        self._notifier.notify(run_id)
        self._request_stop(run, now)

    def _admit(self, known: Quotas, now: float, *, connected: bool) -> None:
        with self._database.read() as session:
            waiting = {run.id: run for run in runs.in_states(session, [RunState.QUEUED])}
            queue = [waiting[run_id] for run_id in runs.queue_order(session)]
            active = runs.in_states(session, list(ACTIVE))
        if not queue:
            return
        cluster = self._cluster(frozenset(runs.resources(queue)), now) if connected else None
        limits = observed.limits(known, self._most_active)
        asked = self._usable(queue, lambda run: observed.queued(run, known), now)
        for admission in admit(asked, self._usable(active, observed.active, now), limits, cluster):
            run = waiting[admission.run_id]
            isolated(self._database, run, "started", functools.partial(self._answer, admission, run, now))

    def _answer(self, admission: Admission, run: RunRow, now: float) -> None:
        if admission.start:
            self._start(run.id, now)
        elif admission.reason != run.reason:
            self._explain(run.id, admission.reason, now)

    def _usable(self, found: Sequence[RunRow], view: Callable[[RunRow], T], now: float) -> list[T]:
        """Apply `view` to each run. A run that this version cannot read is refused and left out."""
        usable: list[T] = []

        def add(run: RunRow) -> None:
            try:
                usable.append(view(run))
            except UnusableRun as error:
                self._refuse_unusable(run.id, str(error), now)

        for run in found:
            isolated(self._database, run, "counted", functools.partial(add, run))
        return usable

    def _refuse_unusable(self, run_id: str, reason: str, now: float) -> None:
        """Set a run that this version cannot read to failed if it is queued, and stop it if it is active."""
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            if run is None or run.state in TERMINAL or run.state == RunState.STOPPING:
                return
            queued = run.state == RunState.QUEUED
            changes = {} if queued else {"stop": "unreadable"}
            runs.transition(
                session,
                run,
                RunState.FAILED if queued else RunState.STOPPING,
                reason=reason[:REASON_LENGTH],
                now=now,
                **changes,
            )
        _log.warning("%s: %s", run.state, reason)
        self._notifier.notify(run_id)

    def _end(self, run: RunRow, jobs: Mapping[str, JobState] | None, now: float) -> None:
        """End a stopping run that cannot be processed: kill its driver, then set it to cancelled."""
        name = submission_id(run.id, run.attempt)
        job = None if jobs is None else jobs.get(name)
        if jobs is None or (job is not None and not job.phase.ended):
            with contextlib.suppress(RayUnavailable):
                self._jobs.kill(name)
            return
        with self._database.write() as session:
            row = runs.lock(session, run.id)
            if row is not None and row.state == RunState.STOPPING:
                runs.transition(session, row, RunState.CANCELLED, reason=row.reason, now=now)
        self._notifier.notify(run.id)

    def _start(self, run_id: str, now: float) -> None:
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            if run is None or run.state != RunState.QUEUED:
                return
            runs.transition(
                session,
                run,
                RunState.STARTING,
                reason=None,
                now=now,
                attempt=run.attempt + 1,
                mark_at_start=run.mark,
                stop=None,
                progress=observed.awaiting(run.progress),
            )
        self._notifier.notify(run_id)
        try:
            self._launch(run, now)
        except OSError as error:
            self._explain(run_id, _unusable(error), now)
        except UnusableRun as error:
            self._refuse_unusable(run_id, str(error), now)

    def _cluster(self, resources: frozenset[str], now: float) -> ClusterCapacity | None:
        looked, known, cluster = self._last_look
        if cluster is None or not resources <= known or not 0 <= now - looked < POOLS_SECONDS:
            cluster = observed.cluster(self._pools.read(resources), grows=self._pools.grows())
            self._last_look = (now, resources, cluster)
        return cluster

    def _explain(self, run_id: str, reason: str | None, now: float) -> None:
        """Store the reason for a run's current state."""
        with self._database.write() as session:
            run = runs.lock(session, run_id)
            if run is None or run.reason == reason or run.state in TERMINAL:
                return
            runs.amend(session, run, now=now, reason=reason)
        self._notifier.notify(run_id)

    def _end_orphans(self, jobs: Mapping[str, JobState]) -> None:
        """Kill drivers of abandoned attempts: two drivers of one run would overwrite each other's files."""
        for name, job in jobs.items():
            try:
                self._end_orphan(name, job)
            except RayUnavailable as error:
                _log.info("to be repeated: %s", error)
            except DatabaseError:
                raise
            except Exception:  # noqa: BLE001 - a damaged record or an answer of Ray may raise anything
                # Other runs must not wait for this one.
                _log.exception("driver %s cannot be ended", name)

    def _end_orphan(self, name: str, job: JobState) -> None:
        named = submitted_run(name)
        if named is None or job.phase.ended:
            return
        run_id, attempt = named
        with self._database.read() as session:
            run = runs.get(session, run_id)
        if run is not None and not (run.state in ACTIVE and run.attempt == attempt):  # None: a job of another service
            self._jobs.kill(name)

    def _quotas(self, now: float) -> Quotas:
        with self._database.read() as session:
            known = quotas.load(session, now)
        unreadable = known.policies.unreadable
        if unreadable and unreadable != self._unreadable:
            _log.warning("cannot be read, and allow nothing: the policies of %s; set them again", ", ".join(unreadable))
        self._unreadable = unreadable
        return known

    def _location_of(self, run_id: str) -> Location | None:
        with self._database.read() as session:
            return runs.location(session, run_id)

    def _offers_of(self, run_id: str) -> list[str]:
        with self._database.read() as session:
            return reuse.locations(session, run_id)

    def _runs(self, *states: RunState) -> list[RunRow]:
        with self._database.read() as session:
            return runs.in_states(session, states)


def _unusable(error: OSError) -> str:
    return f"its directory cannot be used: {error.strerror or error}"
