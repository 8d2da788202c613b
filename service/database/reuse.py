"""Runs that a retry may take stages from, and the stages that it has taken."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sqlalchemy import ColumnElement, bindparam, func, select
from sqlalchemy.orm import Session, defer

from moedisco_ray.core.stages import STAGES
from service.database import projects, runs
from service.database.reuse_tables import OfferRow
from service.database.tables import RunRow
from service.domain.access import Person
from service.domain.states import TERMINAL

MOST_CANDIDATES = 8
"""Maximum number of other runs that are compared with a retry, the newest ones."""
_TAKEN = select(OfferRow.run_id, OfferRow.stages).where(
    OfferRow.run_id.in_(bindparam("ids", expanding=True)), OfferRow.taken.is_not(None)
)
"""Made once: every answer asks this, and making it takes longer."""


def candidates(session: Session, parent: RunRow) -> list[RunRow]:
    """A run to retry, and the newest ended runs that had a driver and that all who may see the run to retry may see.

    The events and logs of the retry name them, and its members read those.
    """
    ended = RunRow.state.in_([state.value for state in TERMINAL])
    query = (
        select(RunRow)
        .options(defer(RunRow.meter), defer(RunRow.estimate))
        .where(_seen_alike(session, parent.project), ended, RunRow.attempt > 0, RunRow.id != parent.id)
        .order_by((RunRow.project == parent.project).desc(), RunRow.id.desc())
        .limit(MOST_CANDIDATES)
    )
    return [parent, *session.scalars(query)]


def _seen_alike(session: Session, project_id: str) -> ColumnElement[bool]:
    if projects.members(session, [project_id]):
        return RunRow.project == project_id
    [project] = projects.by_id(session, [project_id])
    return projects.visible(RunRow.project, Person(project.owner))


def finished_stages(run: RunRow) -> list[str]:
    """Names of the stages that a run has finished in any attempt, as its drivers reported."""
    found = (run.progress.get("reached") or {}).get("stages")
    known = {stage.name for stage in STAGES}
    return [name for name in found if name in known] if isinstance(found, list) else []


def offer(session: Session, run_id: str, donors: Iterable[str]) -> None:
    """Store the runs that a new run may take stages from, the best first; runs that are gone are left out."""
    found = [donor for each in donors if (donor := runs.get(session, each)) is not None]
    session.add_all(
        OfferRow(
            run_id=run_id,
            number=number,
            donor=donor.id,
            donor_project=donor.project,
            location=str(donor.location),
            stages=[],
            taken=None,
        )
        for number, donor in enumerate(found)
    )
    session.flush()


def locations(session: Session, run_id: str) -> list[str]:
    """Paths or URIs of the runs that a run may take stages from, in the order in which its driver counts them."""
    of_run = select(OfferRow.location).where(OfferRow.run_id == run_id)
    return list(session.scalars(of_run.order_by(OfferRow.number)))


def take(session: Session, run_id: str, taken: Mapping[str, int], now: float) -> None:
    """Store the stages that a driver has taken.

    Args:
        session: Writing transaction that has locked the run.
        run_id: The run.
        taken: Number of the offer, by stage; others are ignored, because drivers are not trusted.
        now: Seconds since the epoch.
    """
    if not taken:
        return
    for row in session.scalars(select(OfferRow).where(OfferRow.run_id == run_id)):
        new = {stage for stage, number in taken.items() if number == row.number}
        if new:
            row.stages = [stage.name for stage in STAGES if stage.name in {*row.stages, *new}]
            row.taken = now
    session.flush()


def taken_stages(session: Session, run_ids: Collection[str]) -> dict[str, frozenset[str]]:
    """Names of the stages that runs have taken from others, by the id of the run that took them."""
    found: dict[str, frozenset[str]] = {}
    for run_id, stages in session.execute(_TAKEN, {"ids": list(run_ids)}):
        found[run_id] = found.get(run_id, frozenset()) | frozenset(stages)
    return found


def taken(session: Session, run_id: str, person: Person) -> list[tuple[OfferRow, str | None]]:
    """The offers of runs that a person may see and from which a run has taken stages, with the names of these runs.

    The name of a deleted run is None.
    """
    query = (
        select(OfferRow, RunRow.name)
        .join(RunRow, RunRow.id == OfferRow.donor, isouter=True)
        .where(OfferRow.run_id == run_id, OfferRow.taken.is_not(None))
        .where(projects.visible(func.coalesce(RunRow.project, OfferRow.donor_project), person))
    )
    return [(row, name) for row, name in session.execute(query.order_by(OfferRow.number))]
