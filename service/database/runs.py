"""Creates, lists, changes and deletes runs; all state changes of runs are made here."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Text, cast, func, or_, select, update
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.attributes import set_committed_value

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.locations import Location
from service.database import projects, stream, values
from service.database.tables import RunRow, UnitRow
from service.domain.access import Person
from service.domain.retention import named_runs
from service.domain.run_paths import is_id, own_storage
from service.domain.states import TERMINAL, RunState, may_follow
from service.errors import IllegalTransition, StaleRun, UnusableRun

LEFT_OUT = (defer(RunRow.config), defer(RunRow.meter))
"""Large columns that lists of runs do not show; parsing them would take most of the time."""


def insert(
    session: Session,
    *,
    run_id: str,
    config: RunConfig,
    owner: str,
    priority: int,
    budget_dollars: float | None,
    estimate: dict[str, Any],
    parent: str | None,
    now: float,
    notes: Sequence[str] = (),
    home: Path | None = None,
    project: str | None = None,
) -> RunRow:
    """Create a queued run with an id from `new_id`, by default in its owner's default project.

    `output` of the configuration must be the run's own folder. `parent` is the id of the run that this one retries.
    `home` is the folder for the service's files of a run at a URI; None for a run in a directory.
    """
    document = values.document(config.model_dump(mode="json"))
    waiting = {stage.name: {"status": "waiting", "started": None, "seconds": None} for stage in STAGES}
    run = RunRow(
        id=run_id,
        name=config.name,
        owner=owner,
        project=project or projects.default_of(session, owner, now).id,
        tags=document["tags"],
        priority=priority,
        state=RunState.QUEUED.value,
        reason=None,
        version=1,
        config=document,
        directory=str(config.directory if home is None else home / config.name),
        attempt=0,
        futile=0,
        mark=0,
        mark_at_start=0,
        stop=None,
        budget_dollars=budget_dollars,
        dollars=0.0,
        worker_seconds={},
        meter={},
        estimate=values.document(estimate),
        progress={"stages": waiting, "current": None},
        parent=parent,
        notes=[values.text(note) for note in notes],
        kept=False,
        expires_at=None,
        disk_bytes=None,
        measured=None,
        next_position=1,
        next_seq=0,
        created=now,
        queued=now,
        started=None,
        ended=None,
        updated=now,
    )
    session.add(run)
    session.flush()
    _publish_state(session, run, now)
    return run


def get(session: Session, run_id: str) -> RunRow | None:
    """A run by its id, in the snapshot of this transaction; None if it does not exist."""
    return session.get(RunRow, run_id) if is_id(run_id) else None


def lock(session: Session, run_id: str) -> RunRow | None:
    """The latest state of a run, locked against other writers until this transaction ends."""
    return session.get(RunRow, run_id, with_for_update=True, populate_existing=True) if is_id(run_id) else None


def location(session: Session, run_id: str) -> Location | None:
    """Path or URI of a run directory; None if the run does not exist."""
    run = get(session, run_id)
    return None if run is None else run.location


def inside(session: Session, home: Path, run_id: str) -> str | None:
    """Id of another run whose directory is inside a run's home; None if there is none."""
    below = RunRow.directory.startswith(f"{home}/", autoescape=True)
    return session.scalars(select(RunRow.id).where(below, RunRow.id != run_id).limit(1)).first()


def named(session: Session, name: str, person: Person) -> list[RunRow]:
    """Runs with exactly this id or name that a person may see, newest first; a run with this id decides."""
    meant = or_(RunRow.id == values.text(name), RunRow.name == values.text(name))
    query = select(RunRow).options(*LEFT_OUT).where(meant, projects.visible(RunRow.project, person))
    found = list(session.scalars(query.order_by(RunRow.id.desc()).limit(100)))
    return [run for run in found if run.id == name] or found


def resources(rows: Iterable[RunRow]) -> set[str]:
    """Custom resources of the pools of the runs; runs whose configuration this version refuses are skipped."""
    named: set[str] = set()
    for run in rows:
        with contextlib.suppress(UnusableRun):
            named |= {node_type.resource for node_type in run.pools.by_key.values()}
    return named


def in_states(session: Session, states: Sequence[RunState]) -> list[RunRow]:
    """All runs in any of the states, oldest first."""
    return list(
        session.scalars(select(RunRow).where(RunRow.state.in_([state.value for state in states])).order_by(RunRow.id))
    )


def starts(session: Session, run_id: str | None = None) -> dict[str, str]:
    """Runs whose model or text another run reads that has not succeeded: their ids, each with the id of such a run.

    A failed or cancelled run counts too, because it can be resumed. With `run_id`, only runs that read that run are
    searched.
    """
    query = select(RunRow.id, RunRow.config).where(RunRow.state != RunState.SUCCEEDED.value)
    if run_id is not None:
        query = query.where(cast(RunRow.config, Text).contains(run_id, autoescape=True))
    found = session.execute(query.order_by(RunRow.id))
    return {named: reader for reader, config in found for named in named_runs(config) - {reader}}


def storages(session: Session) -> list[str]:
    """Own folders of runs in `checkpoint.storage`."""
    found = session.execute(select(RunRow.id, RunRow.config)).all()
    return [storage for run_id, config in found if (storage := own_storage(config, run_id)) is not None]


def queue_order(session: Session) -> list[str]:
    """Ids of the queued runs, the next one first."""
    queued = select(RunRow.id).where(RunRow.state == RunState.QUEUED.value)
    return list(session.scalars(queued.order_by(RunRow.priority.desc(), RunRow.queued, RunRow.id)))


def finished(session: Session) -> list[RunRow]:
    """All runs that have ended; their `config` and `meter` are loaded on access."""
    query = select(RunRow).options(*LEFT_OUT).where(RunRow.state.in_([state.value for state in TERMINAL]))
    return list(session.scalars(query.order_by(RunRow.id)))


def mark_trouble(session: Session, run_id: str, trouble: str | None, *, ended: bool) -> None:
    """Store why the service cannot process a run; None if it can.

    Does not increment the run's version, because no decision depends on it. With `ended` false, a run that has ended in
    the meantime is not marked.
    """
    query = update(RunRow).where(RunRow.id == run_id)
    if not ended:
        query = query.where(RunRow.state.not_in([state.value for state in TERMINAL]))
    session.execute(query.values(trouble=trouble).execution_options(synchronize_session=False))


def troubled(session: Session) -> int:
    """Number of runs that the service cannot process."""
    return session.scalar(select(func.count()).where(RunRow.trouble.is_not(None))) or 0


def owner_counts(session: Session, states: Collection[RunState]) -> dict[str, int]:
    condition = RunRow.state.in_([state.value for state in states])
    rows = session.execute(select(RunRow.owner, func.count()).where(condition).group_by(RunRow.owner))
    return dict(rows.all())


def unposted(session: Session, *, since: float, limit: int) -> list[RunRow]:
    """Runs that ended at or after a time and whose end was not posted yet, the first to end first."""
    query = select(RunRow).options(*LEFT_OUT).where(RunRow.ended >= since, RunRow.end_posted.is_(None))
    return list(session.scalars(query.order_by(RunRow.ended, RunRow.id).limit(limit)))


def posted(session: Session, run: RunRow, now: float) -> None:
    """Store that the end of a run was posted, unless the run was resumed meanwhile.

    Does not increment the run's version.
    """
    session.execute(
        update(RunRow)
        .where(RunRow.id == run.id, RunRow.ended == run.ended)
        .values(end_posted=now)
        .execution_options(synchronize_session=False)
    )


def state_counts(session: Session) -> dict[RunState, int]:
    """Number of runs by state, for every state."""
    rows = session.execute(select(RunRow.state, func.count()).group_by(RunRow.state))
    counts = dict(rows.all())
    return {state: counts.get(state.value, 0) for state in RunState}


def units(session: Session, run_id: str) -> list[UnitRow]:
    """A run's units, in the order in which they started."""
    return list(
        session.scalars(select(UnitRow).where(UnitRow.run_id == run_id).order_by(UnitRow.started, UnitRow.unit))
    )


def metered_dollars(session: Session) -> float:
    """Dollars metered so far over all stored runs."""
    return session.scalar(select(func.sum(RunRow.dollars))) or 0.0


def transition(
    session: Session, run: RunRow, state: RunState, *, reason: str | None, now: float, **columns: Any
) -> None:
    """Change the state of a run, and publish the change to its stream.

    `started` is set when the run first runs, `ended` when it ends. A run whose driver was lost keeps its place in the
    queue; a resumed run goes to the end of the queue, with `stop` and `futile` reset. At the end of a run, its trained
    tokens and its hours are stored for lists.

    Args:
        session: Writing transaction.
        run: Run on which the decision was based; it is updated.
        state: New state.
        reason: Reason for the change, as the owner sees it.
        now: Seconds since the epoch.
        columns: Further columns to set.

    Raises:
        IllegalTransition: The table of transitions does not allow this state.
        StaleRun: The run was changed or deleted since it was read.
    """
    before = RunState(run.state)
    if not may_follow(before, state):
        raise IllegalTransition(f"run {run.id} is {before}: it cannot become {state}")
    changes: dict[str, Any] = {
        "state": state.value,
        "reason": None if reason is None else values.text(reason),
        "trouble": None,
        "next_position": RunRow.next_position + 1,
    }
    if state is RunState.RUNNING and run.started is None:
        changes["started"] = now
    if state in TERMINAL:
        changes |= {"ended": now, **_totals(session, run)}
    if before in TERMINAL:
        changes |= {"queued": now, "ended": None, "stop": None, "futile": 0, "expires_at": None, "end_posted": None}
        changes["noticed"] = None
    _change(session, run, now, changes | columns)
    _publish_state(session, run, now)


def amend(session: Session, run: RunRow, *, now: float, **columns: Any) -> None:
    """Change columns of a run other than its state.

    Raises:
        StaleRun: The run was changed or deleted since it was read.
    """
    _change(session, run, now, columns)


def delete(session: Session, run: RunRow) -> None:
    """Delete a run with its events, units and points, but not its files.

    Raises:
        StaleRun: The run was changed or deleted since it was read.
    """
    deleted = session.execute(
        delete_from(RunRow)
        .where(RunRow.id == run.id, RunRow.version == run.version)
        .returning(RunRow.id)
        .execution_options(synchronize_session=False)
    ).scalar()
    if deleted is None:
        raise _stale(run)
    if run in session:
        session.expunge(run)


def _change(session: Session, run: RunRow, now: float, changes: dict[str, Any]) -> None:
    changes = {**changes, "version": run.version + 1, "updated": now}
    position = session.execute(
        update(RunRow)
        .where(RunRow.id == run.id, RunRow.version == run.version)
        .values(**changes)
        .returning(RunRow.next_position)
        .execution_options(synchronize_session=False)
    ).scalar()
    if position is None:
        raise _stale(run)
    for name, value in {**changes, "next_position": position}.items():
        set_committed_value(run, name, value)


def _totals(session: Session, run: RunRow) -> dict[str, Any]:
    """Tokens on which the run has trained, and its hours without the time between attempts; null if unknown."""
    seconds = 0.0
    with contextlib.suppress(UnusableRun):
        seconds = run.usage.wall_seconds
    tokens = session.scalar(select(func.sum(UnitRow.tokens)).where(UnitRow.run_id == run.id))
    return {"tokens": None if tokens is None else int(tokens), "hours": seconds / 3600 or None}


def _publish_state(session: Session, run: RunRow, now: float) -> None:
    data = {"state": run.state, "reason": run.reason, "attempt": run.attempt}
    stream.put(
        session,
        run.id,
        run.next_position - 1,
        [{"time": now, "type": "state", "stage": None, "unit": None, "data": data}],
    )


def _stale(run: RunRow) -> StaleRun:
    return StaleRun(f"run {run.id} was changed by another request; read it again")
