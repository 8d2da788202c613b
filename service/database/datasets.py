"""Data sets, and the contents that owners have uploaded for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sqlalchemy import ColumnElement, Text, cast, delete, exists, func, select
from sqlalchemy.orm import Session

from service.database import projects, values
from service.database.dataset_tables import BlobRow, DatasetFileRow, DatasetRow
from service.database.ids import new_id
from service.database.paging import page_by_id
from service.database.session import lock_until_commit
from service.database.tables import RunRow
from service.domain.access import Person
from service.domain.datasets import DatasetFile, hash_of
from service.domain.run_paths import is_id
from service.domain.states import RunState

_AT_ONCE = 500
"""Number of hashes in one query; databases limit the number of parameters."""


def lock(session: Session, digest: str) -> None:
    """Lock the data sets with a hash until this transaction ends, so that none is created or deleted meanwhile."""
    lock_until_commit(session, "dataset", digest)


def lock_blob(session: Session, sha256: str) -> None:
    """Lock a content until this transaction ends, so that its file is neither stored nor removed meanwhile."""
    lock_until_commit(session, "blob", sha256)


def get(session: Session, dataset_id: str) -> DatasetRow | None:
    return session.get(DatasetRow, dataset_id) if is_id(dataset_id) else None


def page(
    session: Session, person: Person, *, name: str | None, cursor: str | None, limit: int
) -> tuple[list[DatasetRow], str | None]:
    """Data sets that a person may see, newest first, and the cursor of the next page; None on the last one."""
    query = select(DatasetRow).where(projects.visible(DatasetRow.project, person))
    if name is not None:
        query = query.where(DatasetRow.name == values.text(name))
    return page_by_id(session, query, DatasetRow.id, cursor=cursor, limit=limit, newest_first=True)


def named(session: Session, person: Person, name: str, digest: str | None) -> DatasetRow | None:
    """The newest data set with a name, and a hash if one is given, that a person may see; the person's own go first."""
    query = select(DatasetRow).where(DatasetRow.name == name, projects.visible(DatasetRow.project, person))
    if digest is not None:
        query = query.where(DatasetRow.hash == digest)
    own_first = (DatasetRow.owner == values.text(person.name)).desc()
    return session.scalars(query.order_by(own_first, DatasetRow.id.desc()).limit(1)).first()


def same(session: Session, project: str, name: str, digest: str) -> DatasetRow | None:
    """The data set of a project with a name and a hash."""
    query = select(DatasetRow).where(DatasetRow.project == project, DatasetRow.name == name, DatasetRow.hash == digest)
    return session.scalars(query).first()


def exists_with(session: Session, digest: str) -> bool:
    """Whether a data set has this hash."""
    return session.scalar(select(exists().where(DatasetRow.hash == digest))) or False


def insert(
    session: Session, *, name: str, owner: str, project: str, files: Sequence[DatasetFile], now: float
) -> DatasetRow:
    """Create a data set whose files are stored."""
    row = DatasetRow(
        id=new_id(),
        name=name,
        hash=hash_of(files),
        owner=values.text(owner),
        project=project,
        bytes=sum(file.bytes for file in files),
        count=len(files),
        created=now,
    )
    session.add(row)
    session.flush()
    session.add_all(
        DatasetFileRow(dataset_id=row.id, number=number, **file._asdict()) for number, file in enumerate(sorted(files))
    )
    session.flush()
    return row


def files(session: Session, dataset_id: str) -> list[DatasetFile]:
    """The files of a data set, sorted by path."""
    query = select(DatasetFileRow.path, DatasetFileRow.bytes, DatasetFileRow.sha256)
    found = session.execute(query.where(DatasetFileRow.dataset_id == dataset_id).order_by(DatasetFileRow.number))
    return [DatasetFile(*row) for row in found]


def reader(session: Session, digest: str) -> str | None:
    """Id of a run that reads the data sets with a hash and has not succeeded, so that it may still read them."""
    query = select(RunRow.id).where(
        RunRow.state != RunState.SUCCEEDED.value, cast(RunRow.config, Text).contains(f"@sha256:{digest}")
    )
    return session.scalars(query.order_by(RunRow.id).limit(1)).first()


def remove(session: Session, row: DatasetRow) -> list[str]:
    """Delete a data set, and its owner's contents that no other data set of the owner has; returns their hashes."""
    mine = [file.sha256 for file in files(session, row.id)]
    session.execute(delete(DatasetRow).where(DatasetRow.id == row.id))
    return [sha256 for part in _parts(mine) for sha256 in _remove_blobs(session, row.owner, part)]


def known_blobs(session: Session, owner: str, hashes: Collection[str]) -> set[str]:
    """The hashes of contents that an owner has uploaded, among some."""
    own = select(BlobRow.sha256).where(BlobRow.owner == values.text(owner))
    return {sha256 for part in _parts(hashes) for sha256 in session.scalars(own.where(BlobRow.sha256.in_(part)))}


def add_blob(session: Session, owner: str, sha256: str, size: int, now: float) -> None:
    """Store that an owner has uploaded a content."""
    session.merge(BlobRow(owner=values.text(owner), sha256=sha256, bytes=size, created=now))
    session.flush()


def is_used(session: Session, sha256: str) -> bool:
    """Whether any owner has a content."""
    return session.scalar(select(exists().where(BlobRow.sha256 == sha256))) or False


def unknown_blobs(session: Session, hashes: Collection[str]) -> set[str]:
    """The hashes of contents that no owner has, among some."""
    known = select(BlobRow.sha256)
    found = {sha256 for part in _parts(hashes) for sha256 in session.scalars(known.where(BlobRow.sha256.in_(part)))}
    return set(hashes) - found


def abandoned(session: Session, before: float) -> list[str]:
    """Delete the contents that were uploaded before a time and are in no data set of their owner."""
    query = select(BlobRow.owner, BlobRow.sha256).where(BlobRow.created < before, ~_needed())
    found = session.execute(query).all()
    return [sha256 for owner, each in found for sha256 in _remove_blobs(session, owner, [each])]


def owner_bytes(session: Session, owner: str | None = None) -> dict[str, int]:
    """Size of the contents that owners have uploaded (bytes); with `owner`, of this owner alone."""
    query = select(BlobRow.owner, func.sum(BlobRow.bytes)).group_by(BlobRow.owner)
    if owner is not None:
        query = query.where(BlobRow.owner == owner)
    return {name: int(size) for name, size in session.execute(query)}


def _needed() -> ColumnElement[bool]:
    """Condition that a content is in a data set of its owner."""
    return exists().where(
        DatasetFileRow.sha256 == BlobRow.sha256,
        DatasetRow.id == DatasetFileRow.dataset_id,
        DatasetRow.owner == BlobRow.owner,
    )


def _remove_blobs(session: Session, owner: str, hashes: Iterable[str]) -> list[str]:
    removed = delete(BlobRow).where(BlobRow.owner == owner, BlobRow.sha256.in_(hashes), ~_needed())
    found = session.scalars(removed.returning(BlobRow.sha256).execution_options(synchronize_session=False))
    return list(found)


def _parts(hashes: Collection[str]) -> list[list[str]]:
    unique = sorted(set(hashes))
    return [unique[start : start + _AT_ONCE] for start in range(0, len(unique), _AT_ONCE)]
