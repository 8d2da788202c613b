"""Removes files of data sets that nothing refers to: uploads that were given up, and what failed deletions left."""

from __future__ import annotations

from service.database import datasets
from service.database.session import Database
from service.dataset_store import DatasetStore, remove_unused

KEPT_SECONDS = 24 * 3600.0
"""Time for which an upload may rest before it is removed, in seconds."""


def tidy(database: Database, store: DatasetStore, now: float) -> None:
    """Remove uploads that have rested for a day, and contents that are in no data set of the owner who uploaded them.

    Raises:
        OSError: A file cannot be removed.
    """
    before = now - KEPT_SECONDS
    store.remove_old(before)
    with database.write() as session:
        unused = set(datasets.abandoned(session, before))
    contents, folders = store.stored(before)
    with database.read() as session:
        unused |= datasets.unknown_blobs(session, contents)
        folders = [digest for digest in folders if not datasets.exists_with(session, digest)]
    remove_unused(database, store, folders, sorted(unused))
