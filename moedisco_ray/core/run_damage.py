"""Find the damaged files of a run: those that are not what the run wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moedisco_ray.core.artifacts import parse_manifest
from moedisco_ray.core.checksums import Entry, in_threads, without_checksum
from moedisco_ray.core.errors import DamagedError, RunDirError
from moedisco_ray.core.locations import Location, is_uri
from moedisco_ray.core.manifests import MANIFEST
from moedisco_ray.core.run_store import RunStore
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.verification import damage_in

RUN_ID = "run.json"
LOOSE = (RUN_ID, "config.json", "report.json")
"""Files about the run with a checksum of their own."""


def damage_of(location: Location) -> Iterator[tuple[str, list[str]]]:
    """Verify all files of a run, or of an exported model; all weights are read.

    Args:
        location: Directory or URI of the run, or directory of the model.

    Yields:
        Name of each part that exists (`run`, a stage, or `model`), and the names of its damaged files.

    Raises:
        RunDirError: The location holds neither.
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location, verifies=False)
    if not is_uri(location) and (Path(location) / MANIFEST).exists():
        yield "model", damage_in(Path(location))
        return
    loose = {name: content for name in LOOSE if (content := store.read(name)) is not None}
    if not loose:
        raise RunDirError("RUN_DIR", str(location), "holds no run and no exported model; name one that `moedisco` wrote")
    yield "run", [name for name, content in loose.items() if not _is_intact(content)]
    for stage in STAGES:
        content = store.read(f"{stage.directory}/{MANIFEST}")
        if content is not None:
            yield stage.name, _at_uri(store, stage.directory, content) if store.is_remote else damage_in(
                store.directory / stage.directory)


def _is_intact(content: bytes) -> bool:
    try:
        without_checksum(content)
    except ValueError:
        return False
    return True


def _at_uri(store: RunStore, directory: str, content: bytes) -> list[str]:
    try:
        manifest = parse_manifest(content, directory)
    except DamagedError:
        return [MANIFEST]
    entries = {} if manifest is None else manifest.files
    intact = in_threads(lambda entry: Entry(*store.remote.checksum(entry.object)) == entry.content, entries.values())
    return sorted(name for name, right in zip(entries, intact, strict=True) if not right)
