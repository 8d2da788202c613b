"""Runs that a retry may take stages from, and the stages that it has taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from moedisco_ray.core.stages import STAGES
from service.database import runs, values
from service.database.reuse_tables import OfferRow
from service.database.tables import RunRow
from service.domain.states import TERMINAL

MOST_CANDIDATES = 8
"""Maximum number of other runs that are compared with a retry, the newest ones."""


def candidates(session: Session, parent: RunRow) -> list[RunRow]:
    """A run to retry, and the newest ended runs of its owner that had a driver."""
    ended = RunRow.state.in_([state.value for state in TERMINAL])
    query = (
        select(RunRow)
        .options(defer(RunRow.meter), defer(RunRow.estimate))
        .where(RunRow.owner == parent.owner, ended, RunRow.attempt > 0, RunRow.id != parent.id)
        .order_by(RunRow.id.desc())
        .limit(MOST_CANDIDATES)
    )
    return [parent, *session.scalars(query)]


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
            donor_owner=donor.owner,
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


def taken(session: Session, run_id: str, owner: str | None) -> list[tuple[OfferRow, str | None]]:
    """The offers from which a run has taken stages, with the names of the other runs, which are None once deleted.

    Args:
        session: Any transaction.
        run_id: The run.
        owner: Owner whose runs may be named; None for all owners.
    """
    query = (
        select(OfferRow, RunRow.name)
        .join(RunRow, RunRow.id == OfferRow.donor, isouter=True)
        .where(OfferRow.run_id == run_id, OfferRow.taken.is_not(None))
    )
    if owner is not None:
        query = query.where(OfferRow.donor_owner == values.text(owner))
    return [(row, name) for row, name in session.execute(query.order_by(OfferRow.number))]
