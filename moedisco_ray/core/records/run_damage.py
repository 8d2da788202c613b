"""Find the damaged files of a run: those that are not what the run wrote."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moedisco_ray.core.config.renamed import read_stored_config
from moedisco_ray.core.errors import ConfigError, DamagedError, RunDirError, StorageError
from moedisco_ray.core.records.events import without_damage
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import parse_manifest
from moedisco_ray.core.store.checksums import Entry, in_threads, without_checksum
from moedisco_ray.core.store.locations import CORPUS, Location, is_uri, owned_location
from moedisco_ray.core.store.manifests import (
    CHECKPOINTS,
    CODED,
    COMBINED,
    KEPT_SYNCS,
    MANIFEST,
    MEMBERS,
    RESULT,
    ROSTER,
    SYNC,
    SYNCED,
    TRAINED,
    entries_of,
    files_in,
)
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.verification import damage_in
from moedisco_ray.core.store.written import entries_in

RUN_ID = "run.json"
EVENTS = "events.jsonl"
STORAGE = f"{CHECKPOINTS}/storage.json"
"""File of a run that names its folder in `checkpoint.storage`."""
LOOSE = (RUN_ID, "config.json", "report.json", STORAGE)
"""Files about the run with a checksum of their own."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run whose files were verified.

    Attributes:
        stage: Stage that wrote the files; `run` for files about the run, `model` for an exported model.
        damaged: Names of the damaged files, relative to `folder`.
        folder: Folder of the files, relative to the location; for a data owner's files, to the run's folder in the
            owner's storage.
        training: Training whose output the stage has not taken over yet, such as `submodel-3`; empty for other files.
        owner: Data owner whose storage holds the files; empty for files of the run.
        is_verified: Whether the files could be read here.
        is_sync: Whether the files are those of the sync points of an unfinished stage.
    """

    stage: str
    damaged: tuple[str, ...]
    folder: str = ""
    training: str = ""
    owner: str = ""
    is_verified: bool = True
    is_sync: bool = False

    def __str__(self) -> str:
        of = ", sync points" if self.is_sync else ""
        if self.training:
            of = f" of {self.training}"
        elif self.owner:
            of = f" of owner {self.owner}"
        if self.damaged:
            found = f"damaged: {', '.join(self.damaged)}"
        elif self.is_verified:
            found = "ok"
        else:
            remedy = "`moedisco run` with --repair verifies it on the owner's nodes"
            found = f"not verified: the storage cannot be read here; {remedy}"
        return f"{self.stage}{of}: {found}"


def damage_of(location: Location) -> Iterator[Part]:
    """Verify all files of a run, or of an exported model; all weights are read.

    Args:
        location: Directory or URI of the run, or directory of the model.

    Yields:
        Each part that exists; data owners' storages are left to `owned_damage_of`.

    Raises:
        RunDirError: The location holds neither.
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location, verifies=False)
    if not is_uri(location) and (Path(location) / MANIFEST).exists():
        yield Part("model", tuple(damage_in(Path(location))))
        return
    loose = {name: content for name in LOOSE if (content := store.read(name)) is not None}
    if not loose:
        raise RunDirError(
            "RUN_DIR", str(location), "holds no run and no exported model; name one that `moedisco` wrote"
        )
    events = store.read(EVENTS) or b""
    yield Part(
        "run",
        (
            *(name for name, content in loose.items() if not _is_intact(content)),
            *([EVENTS] if without_damage(events) != events else ()),
        ),
    )
    for stage in STAGES:
        damaged = damage_in_folder(store, stage.directory)
        if damaged is not None:
            yield Part(stage.name, tuple(damaged), stage.directory)
    yield from _trainings(store)
    yield from _sync_points(store)


def owned_damage_of(location: Location) -> Iterator[Part]:
    """Verify the corpora of a run's data owners in their storages, as far as this machine can read them.

    Args:
        location: Directory or URI of the run.

    Yields:
        The corpus of each owner, once the run has a corpus.
    """
    store = RunStore.of(location, verifies=False)
    config, identity = store.read("config.json"), store.read(RUN_ID)
    if config is None or identity is None or store.read(f"{CORPUS}/{MANIFEST}") is None:
        return
    try:
        settings, run_id = read_stored_config(config, location), str(without_checksum(identity)["id"])
    except (ValidationError, DamagedError, ValueError):  # damaged themselves, or of another version
        return
    for name, owner in settings.pools.owners.items():
        try:
            place = owned_location(owner.storage, settings.name, run_id)
            damaged = damage_in_folder(RunStore.of(place, pauses=(), verifies=False), CORPUS)
        except (ConfigError, StorageError):
            damaged = None
        yield Part("corpus", tuple(damaged or ()), CORPUS, owner=name, is_verified=damaged is not None)


def damage_in_folder(store: RunStore, folder: str) -> list[str] | None:
    """Names of the damaged files of a committed directory of a run; None if it does not exist.

    Raises:
        StorageError: The URI of the run does not respond.
    """
    if not store.is_remote:
        return damage_in(store.directory / folder) if (store.directory / folder / MANIFEST).exists() else None
    content = store.remote.read(f"{folder}/{MANIFEST}")
    if content is None:
        return None
    try:
        manifest = parse_manifest(content, folder)
    except DamagedError:
        return [MANIFEST]
    entries = {} if manifest is None else manifest.files
    intact = in_threads(lambda entry: Entry(*store.remote.checksum(entry.object)) == entry.content, entries.values())
    return sorted(name for name, right in zip(entries, intact, strict=True) if not right)


def finished_trainings(store: RunStore) -> list[str]:
    """Folders of finished trainings whose stage is not finished: `checkpoints/STAGE-FINGERPRINT/TRAINING`, sorted."""
    ends = (f"/{TRAINED}/{MANIFEST}", f"/{RESULT}")
    folders = {name.removesuffix(end) for name in _in_checkpoints(store) for end in ends if name.endswith(end)}
    # Ray Train's own files
    return sorted(each for each in folders if each.count("/") == 2 and not each.endswith("/ray"))


def _in_checkpoints(store: RunStore) -> list[str]:
    """Names of all files in `checkpoints`."""
    return (
        list(store.remote.list(CHECKPOINTS))
        if store.is_remote
        else [path.relative_to(store.directory).as_posix() for path in files_in(store.directory / CHECKPOINTS)]
    )


def _trainings(store: RunStore) -> Iterator[Part]:
    """The outputs and results of trainings whose stage is not finished."""
    for folder in finished_trainings(store):
        _, stage, training = folder.split("/")
        damaged = [f"{TRAINED}/{name}" for name in damage_in_folder(store, f"{folder}/{TRAINED}") or ()]
        result = store.read(f"{folder}/{RESULT}")
        if result is not None and not _is_intact(result):
            damaged.append(RESULT)
        yield Part(stage.rpartition("-")[0], tuple(damaged), folder, training=training)


def _sync_points(store: RunStore) -> Iterator[Part]:
    """The files of the sync points of stages that are not finished."""
    found: dict[str, set[str]] = {}
    for name in _in_checkpoints(store):
        parts = name.split("/")  # checkpoints/STAGE-FINGERPRINT/sync/sync-0007/...
        if len(parts) > 4 and parts[2] == SYNC and not parts[-1].startswith("."):
            found.setdefault("/".join(parts[:3]), set()).add("/".join(parts[3:]))
    for home, files in found.items():
        completed = sorted(file for file in files if file.endswith(f"/{SYNCED}"))
        damaged = [*_damage_of_members(store, home, files), *_damage_in_syncs(store, home, completed)]
        yield Part(home.split("/")[1].rpartition("-")[0], tuple(sorted(damaged)), home, is_sync=True)


def _damage_of_members(store: RunStore, home: str, files: Collection[str]) -> Iterator[str]:
    """Names, below `home`, of the damaged files that members and coordinator wrote for a sync point to come."""
    for name in (each for each in files if each.split("/")[1] == MEMBERS and each.endswith(".json")):
        values, weights = _values(store.read(f"{home}/{name}")), f"{name.removesuffix('.json')}.bin"
        if values is None:
            yield name
        elif not name.endswith(f"/{ROSTER}") and not _is_made_of(store, f"{home}/{weights}", values["ranges"]):
            yield weights


def _damage_in_syncs(store: RunStore, home: str, completed: Sequence[str]) -> Iterator[str]:
    """Names, below `home`, of the damaged files of completed sync points: records, and weights of the last ones."""
    kinds = (*COMBINED, *CODED)
    for name in completed:
        values, folder = _values(store.read(f"{home}/{name}")), name.split("/")[0]
        if values is None:
            yield name
        elif name in completed[-KEPT_SYNCS:]:
            files = {file: entry for file, entry in entries_of(values).items() if str(Path(file).parent) in kinds}
            right = in_threads(
                lambda each: _is_made_of(store, each[0], [each[1]]),
                [(f"{home}/{folder}/{file}", entry) for file, entry in files.items()],
            )
            yield from (f"{folder}/{file}" for file, is_right in zip(files, right, strict=True) if not is_right)


def _is_made_of(store: RunStore, name: str, entries: Sequence[Sequence[Any]]) -> bool:
    """Whether consecutive parts of a file have these sizes and checksums."""
    parts = [Entry(*each) for each in entries]
    return entries_in(store, store.directory / name, [part.size for part in parts]) == parts


def _values(content: bytes | None) -> dict[str, Any] | None:
    """The values of a JSON document with a checksum; None if it is damaged or missing."""
    with contextlib.suppress(ValueError):
        return without_checksum(content or b"")
    return None


def _is_intact(content: bytes) -> bool:
    return _values(content) is not None
