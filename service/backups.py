"""Backs up the database of a service, with the files of its state directory that it needs, and restores it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.checksums import sync
from service.backup_archive import ArchiveWriter, Manifest, read_manifest, stored_files, stored_rows
from service.database import audit, leases, snapshots
from service.database.session import Database
from service.errors import DatabaseError
from service.process import SECRET_FILES, locked, make_private

TOKEN_FILE = "admin-token"  # noqa: S105 - the name of a file
_STATE_FILES = (TOKEN_FILE, *SECRET_FILES)
"""Files of a state directory that a backup contains, if they exist."""


def back_up(url: str, state_dir: Path, path: Path) -> Manifest:
    """Write a backup of a database as it is at one moment, whether or not a service uses it.

    The file appears, complete and read back, under its name at the end; until then, an earlier file stays.

    Args:
        url: URL of the database.
        state_dir: State directory of the service.
        path: File to write; only its owner can read it.

    Raises:
        ConfigError: The database does not exist or is not one of this version, or the file cannot be written.
        DatabaseError: The database does not answer.
    """
    _check_database(url)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            draft = Path(scratch) / "backup"
            written = _write(url, state_dir, draft)
            if read_manifest(draft) != written:
                raise ConfigError("FILE", str(path), "is not what was written; use another disk")
            draft.replace(path)
        sync(path.parent)
    except sqlite3.Error as error:
        raise ConfigError("FILE", str(path), f"cannot be written: {error}") from error
    except OSError as error:
        raise ConfigError("FILE", str(path), f"cannot be written ({error.strerror or error})") from error
    _record(url, path)
    return written


def restore(url: str, state_dir: Path, path: Path) -> tuple[Manifest, list[str]]:
    """Fill an empty database from a backup, and migrate it to this version.

    Everything is checked before the first write, and all rows are written in one transaction.

    Args:
        url: URL of the database; a file of SQLite is created.
        state_dir: State directory, in which no service may run; created if absent.
        path: File of the backup.

    Returns:
        The backup's manifest, and the names of the files that were written to the state directory.

    Raises:
        ConfigError: The backup is damaged or of a later version, the database has rows, or a service uses it.
        DatabaseError: The database does not answer.
    """
    _parsed(url)
    manifest = read_manifest(path)
    if manifest.revision not in Database.revisions():
        made_by = f"{manifest.version}, tables {manifest.revision}"
        remedy = f"was made by a later version ({made_by}); restore it with that one"
        raise ConfigError("FILE", str(path), remedy)
    make_private(state_dir)
    with locked(state_dir), contextlib.closing(Database(url)) as database:
        files = {name: content for name, content in stored_files(path, manifest).items() if name in _STATE_FILES}
        with database.write() as session:
            _check_empty(session, url)
            database.migrate_in(session, manifest.revision)
            _fill(session, path, manifest)
            database.migrate_in(session)
            _note(session, "backup.restore", path, {"created": manifest.created, "version": manifest.version})
        return manifest, [name for name, content in files.items() if _put(state_dir / name, content)]


def _check_database(url: str) -> None:
    file = _parsed(url).database
    if url.startswith("sqlite:") and not (file and Path(file).is_file()):
        raise ConfigError("--database-url", url, "does not exist; name the database or the --state-dir of a service")


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise ConfigError("--database-url", url, "must start with sqlite:/// or postgresql+psycopg://") from error


def _write(url: str, state_dir: Path, draft: Path) -> Manifest:
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with (
        os.fdopen(descriptor, "wb") as file,
        snapshots.snapshot(url, draft.parent) as session,
        ArchiveWriter(file) as archive,
    ):
        revision = Database.revision(session)
        if revision not in Database.revisions():
            found = "no tables" if revision is None else f"tables of a later version ({revision})"
            raise ConfigError("--database-url", _parsed(url).render_as_string(), f"has {found}; nothing was backed up")
        for shape in snapshots.tables(session):
            archive.add_table(shape, snapshots.rows(session, shape))
        for name, content in _files(state_dir):
            archive.add_file(name, content)
        manifest = archive.finish(revision=revision, database=session.get_bind().dialect.name, created=time.time())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _files(state_dir: Path) -> Iterator[tuple[str, bytes]]:
    for name in _STATE_FILES:
        with contextlib.suppress(FileNotFoundError):
            yield name, (state_dir / name).read_bytes()


def _record(url: str, path: Path) -> None:
    """Store the time of the backup, which the metrics show; a database of an earlier version has no place for it."""
    with contextlib.closing(Database(url)) as database, contextlib.suppress(DatabaseError):
        database.check()
        with database.write() as session:
            leases.done(session, leases.BACKUP)
            _note(session, "backup.create", path, {})


def _note(session: Session, action: str, path: Path, detail: dict[str, str | float]) -> None:
    audit.note(
        session,
        owner="operator",
        token_id=None,
        action=action,
        target=path.name,
        detail=dict(detail),
        address=None,
        now=time.time(),
    )


def _check_empty(session: Session, url: str) -> None:
    shown = _parsed(url).render_as_string()
    holder = leases.holder(session, leases.LEASE) if snapshots.has_table(session, "leases") else None
    if holder is not None:
        raise ConfigError("--database-url", shown, f"is in use by the service {holder}; stop it, or name another one")
    if not snapshots.is_empty(session):
        remedy = "has rows; restore into an empty database, or into a new --state-dir"
        raise ConfigError("--database-url", shown, remedy)


def _fill(session: Session, path: Path, manifest: Manifest) -> None:
    expected = {each.name: frozenset(each.columns) for each in snapshots.tables(session)}
    for table in manifest.tables:
        if expected.get(table.name) != frozenset(table.columns):
            remedy = f"its table {table.name!r} is not that of revision {manifest.revision}; use another backup"
            raise ConfigError("FILE", str(path), remedy)
    for shape, rows in stored_rows(path, manifest):
        snapshots.store(session, shape, rows)


def _put(path: Path, content: bytes) -> bool:
    """Write a private file unless it exists; returns whether it was written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return True
