"""Take finished stages from other runs: those that this run would make from the same settings and the same artifacts.

A stage's fingerprint covers everything that its artifact depends on, and a manifest names the contents that it was made
from. So where both are equal, so are the artifacts: a run that changes its last stage makes the last stage alone. Files
of runs in directories of one file system are hard links, so that they take no space twice, and stay when the other run
is deleted; others are copied.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.stages import STAGES, Stage
from moedisco_ray.core.store.artifacts import Manifest, is_done, reporting_full_disk
from moedisco_ray.core.store.checksums import note_entries
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.run_directory import CONFIG
from moedisco_ray.execution.stage_sequence import inputs_of, manifest_of


@dataclasses.dataclass(frozen=True)
class Donor:
    """Another run, by its name and its storage."""

    name: str
    store: RunStore


def donors(locations: Sequence[Location], config: RunConfig) -> tuple[Donor, ...]:
    """The runs at some locations. A run that is among its own donors gives itself nothing.

    Raises:
        ConfigError: A location holds no run, or text of the run stays with data owners.
        StorageError: A URI does not respond.
    """
    if locations and config.owners:
        raise ConfigError(
            "--reuse", str(locations[0]), "is impossible: what data owners' storages hold belongs to one run; omit it"
        )
    found = []
    for location in locations:
        store = RunStore.of(location)
        content = store.read(CONFIG)
        if content is None:
            raise ConfigError("--reuse", str(location), "holds no run; name the directory or URI of a run")
        found.append(Donor(stored_config(json.loads(content)).name, store))
    return tuple(found)


def reuse(
    store: RunStore, others: Sequence[Donor], digests: Mapping[str, str], check: Callable[[], None]
) -> dict[str, str]:
    """Take every stage that others have made and this run would make alike, in the stages' order.

    Args:
        store: The run's storage.
        others: Other runs; the first that has a stage gives it.
        digests: Fingerprint of each stage of the run.
        check: Raises an error once another driver has taken over the run.

    Returns:
        Name of the run that gave it, by stage.

    Raises:
        DamagedError: A file of another run is damaged.
        DiskFullError: The disk is full.
        StorageError: A URI does not respond.
    """
    taken = {}
    for stage in STAGES if others else ():
        inputs = inputs_of(stage, {each.name: manifest_of(each, store) for each in STAGES})
        if is_done(manifest_of(stage, store), digests[stage.name], inputs):
            continue
        for other in others:
            manifest = manifest_of(stage, other.store)
            if manifest is not None and is_done(manifest, digests[stage.name], inputs):
                _take(stage, other.store, store, manifest, check)
                taken[stage.name] = other.name
                break
    return taken


def _take(stage: Stage, other: RunStore, store: RunStore, manifest: Manifest, check: Callable[[], None]) -> None:
    source, target = other.directory / stage.directory, store.directory / stage.directory
    with other.using(source):
        draft = store.draft(target)
        shutil.rmtree(draft, ignore_errors=True)
        try:
            with reporting_full_disk(target):
                shutil.copytree(source, draft, copy_function=_linked, ignore=shutil.ignore_patterns(MANIFEST))
                if not store.is_remote:
                    note_entries(draft, manifest.files)  # they were verified where they are from
                store.replace(draft, target, dataclasses.asdict(manifest), check)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # on success, it was moved


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
