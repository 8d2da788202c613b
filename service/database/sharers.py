"""Sizes of runs, in which a file that several runs of an owner share counts once.

`RunRow.disk_bytes` leaves out files that have several names on their disk. Their sizes are in `ShareRow`, by folder:
runs whose rows have the same key share the folder's files. These files count for the oldest of the runs that exist, so
that the deletion of a run moves them to the next one without any further change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from sqlalchemy import bindparam, delete, exists, func, insert, or_, select, update
from sqlalchemy.orm import Session, aliased

from service.database import values
from service.database.reuse_tables import OfferRow, ShareRow
from service.database.tables import RunRow
from service.domain.states import ACTIVE

_older, _owner, _mine = aliased(ShareRow), aliased(RunRow), aliased(RunRow)
_COUNTED = (
    select(ShareRow.run_id, func.sum(ShareRow.bytes))
    .join(_mine, _mine.id == ShareRow.run_id)
    .where(
        ShareRow.run_id.in_(bindparam("ids", expanding=True)),
        ~exists().where(
            _older.key == ShareRow.key,
            _older.run_id < ShareRow.run_id,
            _owner.id == _older.run_id,
            _owner.owner == _mine.owner,
        ),
    )
    .group_by(ShareRow.run_id)
)
"""Bytes of shared files that count for each run. Made once: every answer asks this, and making it takes longer."""


class Share(NamedTuple):
    """Files in a folder that have several names: a digest of their numbers on the disk, and their size (bytes)."""

    key: str
    bytes: int


def unmeasured(session: Session) -> list[RunRow]:
    """Runs whose size may have changed since it was last measured; another run may have taken stages of theirs."""
    active = RunRow.state.in_([state.value for state in ACTIVE])
    shared = exists().where(OfferRow.donor == RunRow.id, OfferRow.taken >= RunRow.measured)
    changed = or_(active, RunRow.measured.is_(None), RunRow.measured < RunRow.ended, shared)
    return list(session.scalars(select(RunRow).where(changed).order_by(RunRow.id)))


def measured(session: Session, run_id: str, size: int, shares: Mapping[str, Share], now: float) -> None:
    """Store the size of a run's directory.

    Does not increment the run's version, because no decision depends on the size.

    Args:
        session: Writing transaction.
        run_id: The run; nothing is stored if it was deleted.
        size: Size of the files that have one name (bytes).
        shares: Files that have several names, by folder.
        now: Seconds since the epoch.
    """
    stored = session.execute(
        update(RunRow)
        .where(RunRow.id == run_id)
        .values(disk_bytes=size, measured=now)
        .returning(RunRow.id)
        .execution_options(synchronize_session=False)
    ).scalar()
    if stored is None:
        return
    session.execute(delete(ShareRow).where(ShareRow.run_id == run_id))
    rows = [
        {"run_id": run_id, "folder": values.text(folder, 64), "key": share.key, "bytes": share.bytes}
        for folder, share in shares.items()
    ]
    if rows:
        session.execute(insert(ShareRow), rows)


def sizes(session: Session, found: Collection[RunRow]) -> dict[str, int | None]:
    """Size of each run with the shared files that count for it (bytes), by id; None for a run without a size."""
    counted = session.execute(_COUNTED, {"ids": [run.id for run in found]})
    shared = {run_id: int(size) for run_id, size in counted}
    return {run.id: None if run.disk_bytes is None else run.disk_bytes + shared.get(run.id, 0) for run in found}


def owner_bytes(session: Session, owner: str | None = None) -> dict[str, int]:
    """Size of run directories by owner, as last measured (bytes); with `owner`, of this owner alone."""
    plain = select(RunRow.owner, func.sum(RunRow.disk_bytes)).group_by(RunRow.owner)
    files = select(RunRow.owner, func.max(ShareRow.bytes).label("bytes")).join(RunRow, RunRow.id == ShareRow.run_id)
    if owner is not None:
        plain, files = plain.where(RunRow.owner == owner), files.where(RunRow.owner == owner)
    each = files.group_by(RunRow.owner, ShareRow.key).subquery()
    found = {name: int(size or 0) for name, size in session.execute(plain)}
    for name, size in session.execute(select(each.c.owner, func.sum(each.c.bytes)).group_by(each.c.owner)):
        found[name] = found.get(name, 0) + int(size)
    return found
