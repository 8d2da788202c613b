"""Take finished stages from other runs: those that this run would make from the same settings and the same artifacts.

A stage's fingerprint covers everything that its artifact depends on, and a manifest names the contents that it was made
from. So where both are equal, so are the artifacts: a run that changes its last stage makes the last stage alone. Files
of runs in directories of one file system are hard links, so that they take no space twice, and stay when the other run
is deleted; others are copied. Either way, every file of a stage is verified before the stage is taken, and a stage with
a file that is damaged or gone is not taken at all.

A person who names another run learns of its damage in an error. A service offers runs that may have been deleted when
the driver starts: the driver then makes the stages itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.errors import ConfigError, DamagedError, StorageError
from moedisco_ray.core.stages import STAGES, Stage
from moedisco_ray.core.store.artifacts import FULL, Manifest, is_done, reporting_full_disk
from moedisco_ray.core.store.checksums import Entry, in_threads, is_intact, note_entries
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.run_directory import CONFIG
from moedisco_ray.execution.stage_sequence import Taken, inputs_of, manifest_of

CARD = "README.md"
"""File of the finished model that each run writes for itself."""
_UNREADABLE = (ConfigError, DamagedError, StorageError, OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class Donor:
    """Another run.

    Attributes:
        number: Its place among the locations that were named, from 0.
        name: Name of the run.
        store: Storage of the run.
    """

    number: int
    name: str
    store: RunStore


@dataclasses.dataclass(frozen=True)
class Donors:
    """Other runs from which stages may be taken.

    Attributes:
        found: The runs that can be read.
        unreadable: Number of runs that were offered and cannot be read.
        lenient: Whether a run that cannot be read is passed over instead of ending the run.
    """

    found: tuple[Donor, ...] = ()
    unreadable: int = 0
    lenient: bool = False

    def remarks(self) -> Iterator[str]:
        """A sentence about the runs that cannot be read."""
        if self.unreadable:
            yield f"{self.unreadable} of the runs to reuse cannot be read; stages that only they have are made again"


def donors(locations: Sequence[Location], config: RunConfig, *, lenient: bool = False) -> Donors:
    """The runs at some locations. A run that is among its own donors gives itself nothing.

    Args:
        locations: Directories or URIs of runs.
        config: Configuration of the run that takes stages.
        lenient: Whether to pass over runs that cannot be read.

    Raises:
        ConfigError: A location holds no run, or text of the run stays with data owners.
        DamagedError: The configuration of a run is damaged.
        StorageError: A URI does not respond.
    """
    if locations and config.owners:
        if lenient:
            return Donors(lenient=True)
        raise ConfigError(
            "--reuse", str(locations[0]), "is impossible: what data owners' storages hold belongs to one run; omit it"
        )
    found = []
    for number, location in enumerate(locations):
        with contextlib.suppress(*(_UNREADABLE if lenient else ())):
            found.append(_donor(number, location))
    return Donors(tuple(found), len(locations) - len(found), lenient)


def _donor(number: int, location: Location) -> Donor:
    store = RunStore.of(location)
    content = store.read(CONFIG)
    if content is None:
        raise ConfigError("--reuse", str(location), "holds no run; name the directory or URI of a run")
    return Donor(number, stored_config(json.loads(content)).name, store)


def reuse(
    store: RunStore, others: Donors, digests: Mapping[str, str], check: Callable[[], None]
) -> tuple[dict[str, Taken], list[str]]:
    """Take every stage that others have made and this run would make alike, in the stages' order.

    Args:
        store: The run's storage.
        others: Other runs; the first that has a stage gives it.
        digests: Fingerprint of each stage of the run.
        check: Raises an error once another driver has taken over the run.

    Returns:
        The run that gave it, by stage; and a sentence about each stage that could not be taken.

    Raises:
        DamagedError: A file of another run is damaged.
        DiskFullError: The disk is full.
        StorageError: A URI does not respond.
    """
    taken: dict[str, Taken] = {}
    remarks: list[str] = []
    for stage in STAGES if others.found else ():
        inputs = inputs_of(stage, {each.name: manifest_of(each, store) for each in STAGES})
        if is_done(manifest_of(stage, store), digests[stage.name], inputs):
            continue
        for other in others.found:
            try:
                manifest = manifest_of(stage, other.store)
                if manifest is None or not is_done(manifest, digests[stage.name], inputs):
                    continue
                with _copied(stage, other.store, store, manifest) as draft:
                    store.replace(draft, store.directory / stage.directory, dataclasses.asdict(manifest), check)
            except _Unusable as error:
                if not others.lenient:
                    raise error.cause from error
                remarks.append(f"stage {stage.name} of a run to reuse is damaged or was deleted, so it is made again")
                continue
            taken[stage.name] = Taken(other.name, other.number)
            break
    return taken, remarks


class _Unusable(Exception):  # noqa: N818 - an answer about a stage, not an error of its own
    """A stage of another run cannot be read as a whole; `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextlib.contextmanager
def _copied(stage: Stage, other: RunStore, store: RunStore, manifest: Manifest) -> Iterator[Path]:
    """A draft with all files of a stage of another run, verified; what is left of the draft is deleted at the end."""
    draft = store.draft(store.directory / stage.directory)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with reporting_full_disk(store.directory):
            try:
                draft.mkdir(parents=True)
                _copy(stage, other, draft, manifest)
            except OSError as error:
                if error.errno in FULL:
                    raise
                raise _Unusable(error) from error
            except (DamagedError, StorageError) as error:
                raise _Unusable(error) from error
            if not store.is_remote:
                note_entries(draft, manifest.files)  # they have just been verified
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # on success, it was moved


def _copy(stage: Stage, other: RunStore, draft: Path, manifest: Manifest) -> None:
    source = other.directory / stage.directory
    # What is in a directory is verified in the draft: until then, the other run may still be deleted.
    with other.using(source) if other.is_remote else contextlib.nullcontext():
        for name in manifest.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise _damaged(stage, other, name)
            target = draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if name == CARD:
                    shutil.copy2(source / name, target)  # this run writes its own
                else:
                    _link(source / name, target)

    def is_whole(item: tuple[str, Entry]) -> bool:
        return is_intact(draft / item[0], item[1])

    for name, whole in zip(manifest.files, in_threads(is_whole, manifest.files.items()), strict=True):
        if not whole:
            raise _damaged(stage, other, name)


def _damaged(stage: Stage, other: RunStore, name: str) -> DamagedError:
    return DamagedError(f"{stage.directory}/{name}", stage.name, str(other.location))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
