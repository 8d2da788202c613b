"""The folder of a run in `checkpoint.storage`, which holds the checkpoints of its trainings."""

from __future__ import annotations

import uuid

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import DamagedError, StorageError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.records.run_damage import STORAGE
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.core.store.checksums import with_checksum, without_checksum
from moedisco_ray.core.store.locations import Location, joined
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.training.checkpoints import checkpoint


def own_storage(config: RunConfig, store: RunStore) -> Location | None:
    """This run's folder in `checkpoint.storage`; None if the run has none yet.

    Raises:
        DamagedError: The file that names the folder is damaged.
    """
    stored = None if config.checkpoint.storage is None else store.read(STORAGE)
    if stored is None:
        return None
    try:
        folder = str(without_checksum(stored)["folder"])
    except ValueError as error:
        raise DamagedError(STORAGE, "", str(store.location)) from error
    return joined(str(config.checkpoint.storage), folder)


def made_storage(config: RunConfig, store: RunStore) -> Location | None:
    """This run's folder in `checkpoint.storage`, with a new name if it has none; None without that setting.

    A random part makes the folder's name unique: other runs may have the same name.
    """
    path = store.directory / STORAGE
    if config.checkpoint.storage is not None:
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json(path, with_checksum({"folder": f"{config.name}-{uuid.uuid4().hex[:12]}"}))
        store.publish(path)
    return own_storage(config, store)


def remove(checkpoints: Location, emit: Emit) -> None:
    """Delete checkpoints; if the storage fails, emit a warning."""
    try:
        checkpoint.remove(checkpoints)
    except StorageError as error:  # not fatal: the artifact made from them exists
        emit(Event("warning", data={"message": f"checkpoints are left over: {error}"}))
