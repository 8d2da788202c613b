"""Prepare a run at a URI for a new driver: update its working copy, and delete objects that are no longer needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.store.manifests import DRAFTS, LEASE, LOGS, MANIFEST, OBJECTS, RECEIPTS, STEPS, attempt_of
from moedisco_ray.core.store.run_store import RunStore


def begin(store: RunStore, artifacts: Iterable[str], *, fresh: bool) -> None:
    """Update the working copy to the run's state at the URI, before a driver continues the run.

    Args:
        store: The run.
        artifacts: Names of the artifacts' directories.
        fresh: Whether to delete the working copy first, because the run's last driver used another one.

    Raises:
        RunDirError: The URI is not empty and holds no run.
    """
    listed = store.remote.list()
    if "config.json" not in listed and listed.keys() - {LEASE}:
        raise RunDirError("output", str(store.location), "is not empty and holds no run; choose another name")
    if fresh:
        shutil.rmtree(store.directory, ignore_errors=True)
        shutil.rmtree(store.home / "records", ignore_errors=True)
    store.directory.mkdir(parents=True, exist_ok=True)
    committed = {name.rpartition("/")[0] for name in listed if name.endswith(f"/{MANIFEST}")}
    for artifact in artifacts:
        if artifact in committed:
            store.renew(artifact, store.remote.read(f"{artifact}/{MANIFEST}") or b"")
        else:
            shutil.rmtree(store.directory / artifact, ignore_errors=True)
    for name in listed:
        loose = name.partition("/")[0] not in (OBJECTS, RECEIPTS, LOGS, LEASE, *artifacts) and f"/{STEPS}/" not in name
        if fresh and loose and not name.endswith(f"/{MANIFEST}"):
            store.remote.download(name, store.directory / name)


def collect(store: RunStore) -> None:
    """Delete objects that no manifest lists, and unfinished ones.

    Call this only while no driver or worker uses the run.
    """
    if not store.is_remote:
        return
    listed = store.remote.list()
    used: set[str] = set()
    for name in listed:
        top = name.partition("/")[0]
        if name.endswith(f"/{MANIFEST}") and top not in (OBJECTS, RECEIPTS) and f"/{STEPS}/" not in name:
            used |= {entry.object for entry in (store.manifest(name[: -len(MANIFEST) - 1]) or {}).values()}
    stored = {name for name in listed if name.startswith(f"{OBJECTS}/")}
    kept = set(map(attempt_of, used))
    for attempt in sorted(set(map(attempt_of, stored)) - kept):
        store.remote.delete_folder(attempt)
    for name in sorted(stored - used):
        if attempt_of(name) in kept:
            store.remote.delete(name)
    store.remote.delete_folder(RECEIPTS)
    store.remote.delete_folder(DRAFTS)
