"""The directory of a run before a stage runs: its configuration, whether other settings may use it, and its repair."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core import stages
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.renamed import gone_values, read_stored_config
from moedisco_ray.core.errors import DamagedError, RunDirError
from moedisco_ray.core.records.events import Event, EventLog, without_damage
from moedisco_ray.core.records.run_damage import EVENTS, RUN_ID, Part, damage_of, finished_trainings
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import disk_full, run_id, write_json
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.core.store.manifests import MANIFEST, MEMBERS, RESULT, ROSTER, TRAINED
from moedisco_ray.core.store.run_store import RunStore

CONFIG = "config.json"


def check_directory(config: RunConfig, *, redo: bool) -> None:
    """Check that a run may use its directory.

    Args:
        config: The run's configuration.
        redo: Whether to accept a run with other settings, whose stages are made again.

    Raises:
        DamagedError: The configuration of the run is damaged.
        RunDirError: The directory holds a run with other settings, or something else.
    """
    directory = config.directory
    if (directory / CONFIG).exists():
        changed = [] if redo else replaced_settings(config)
        if changed:
            raise RunDirError(
                "output",
                str(directory),
                f"holds a run with other settings ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}); "
                "choose another name, or pass --redo to repeat what they change",
            )
    elif directory.exists() and any(found.name != EVENTS for found in directory.iterdir()):
        raise RunDirError("output", str(directory), "is not empty and holds no run; choose another name")


def replaced_settings(config: RunConfig) -> list[str]:
    """Settings of a directory's run that a configuration changes, if the run has work that depends on them.

    Values of settings that are gone are among them: this version would continue the run with others.
    """
    directory = config.directory
    if not (directory / CONFIG).exists() or not _holds_work(directory):
        return []
    changed = stages.changed_settings(_stored(directory), config)
    return gone_values(json.loads((directory / CONFIG).read_bytes())) + changed


def create(directory: Path) -> None:
    with reporting_unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True)


def write_config(config: RunConfig) -> Path:
    """Write the configuration into the run directory, and return its file."""
    path = config.directory / CONFIG
    with reporting_unwritable(config.directory):
        write_json(path, with_checksum(config.model_dump(mode="json")))
    return path


@dataclasses.dataclass(frozen=True)
class Adoption:
    """A listener that writes a changed configuration once a stage or a checkpoint is made with it.

    Until then the old configuration is that of the run, and continues it.
    """

    config: RunConfig
    store: RunStore

    def __call__(self, event: Event) -> None:
        """Write the configuration at the first event that says that something is made."""
        if event.type in ("checkpoint", "stage_finished", "run_finished") and replaced_settings(self.config):
            self.store.publish(write_config(self.config))


def repair(config: RunConfig, store: RunStore) -> Iterator[Event]:
    """Delete what is damaged, so that the run makes it again.

    That are the manifests of damaged stages, outputs of trainings whose stage is not finished, the sync points of such
    a stage, and files about the run. What data owners' storages hold is left to `stages.corpus.repair_owned`.

    Yields:
        A warning for each of them.
    """
    for part in damage_of(store.location):
        if not part.damaged:
            continue
        if part.training:
            _remove_output(store, part.folder)
        elif part.is_sync:
            _repair_sync_points(store, part)
        elif part.folder:
            store.delete(f"{part.folder}/{MANIFEST}")
        else:
            for file in part.damaged:
                _repair_loose(config, store, file)
        yield repaired(part)


def repaired(part: Part) -> Event:
    """A warning about a damaged part of a run, which is about to be made again."""
    damaged = part.damaged
    what, again = f"stage {part.stage}", "the stage is made again"
    if part.training:
        what, again = f"{part.training} of stage {part.stage}", "its training is made again"
    elif part.is_sync:
        what = f"the sync points of stage {part.stage}"
        again = "their members write them again" if _is_of_members(part) else "the stage is made again from its start"
    elif part.owner:
        what = f"stage {part.stage}, in the storage of data owner {part.owner}"
    elif not part.folder:
        what, again = "the run", f"{'they are' if len(damaged) > 1 else 'it is'} made again"
        if EVENTS in damaged:
            again += "; costs and curves lack the events that are lost"
    return Event(
        "warning",
        part.stage if part.folder else None,
        part.training or None,
        data={"message": f"damaged: {', '.join(damaged[:3])}{', ...' if len(damaged) > 3 else ''} of {what}; {again}"},
    )


def _repair_sync_points(store: RunStore, part: Part) -> None:
    """Delete what members have written, if only that is damaged: they write it again from their checkpoints.

    Otherwise delete all sync points, and the trainings that ended after them. Checkpoints with weights of the sync
    points that are deleted are discarded by the trainings, which know where they are.
    """
    home = store.directory / part.folder
    if _is_of_members(part):
        for file in part.damaged:  # sync-0007/members/NAME.bin
            written = f"{part.folder}/{Path(file).parent}"
            # The record of who is combined has checksums of what is written again.
            for name in (ROSTER, f"{Path(file).stem}.json", f"{Path(file).stem}.bin"):
                store.delete(f"{written}/{name}")
        return
    store.remove(home)
    for folder in finished_trainings(store):
        if (store.directory / folder).parent == home.parent:
            _remove_output(store, folder)


def _is_of_members(part: Part) -> bool:
    return all(Path(file).parts[1] == MEMBERS for file in part.damaged)


def _remove_output(store: RunStore, folder: str) -> None:
    store.remove(store.directory / folder / TRAINED)
    store.delete(f"{folder}/{RESULT}")


def _repair_loose(config: RunConfig, store: RunStore, file: str) -> None:
    if file == CONFIG:
        store.publish(write_config(config))
        return
    if file == EVENTS:
        with (store.directory / EVENTS).open("r+b") as log:  # in place: a lock on this file holds the run
            content = without_damage(log.read())
            log.seek(0)
            log.write(content)
        return
    store.delete(file)  # the run writes its report again
    started = [event.data["id"] for event in EventLog.parse(store.read(EVENTS) or b"") if event.type == "run_started"]
    if file == RUN_ID and started:
        run_id(store.directory, str(started[0]))


@contextlib.contextmanager
def reporting_unwritable(directory: Path) -> Iterator[None]:
    """Turn the operating system's errors about a run directory into errors for users.

    Raises:
        RunDirError: The directory cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(directory) from error
        raise RunDirError("output", str(directory), f"cannot be written ({error.strerror})") from error


def _stored(directory: Path) -> RunConfig:
    try:
        return read_stored_config((directory / CONFIG).read_bytes(), str(directory))
    except ValidationError as error:
        mistake = first_mistake(error.errors())
        raise RunDirError(
            "output", str(directory), f"holds a run of another version ({mistake}); choose another name"
        ) from error
    except OSError as error:
        raise DamagedError(CONFIG, "", str(directory)) from error


def _holds_work(directory: Path) -> bool:
    """Whether a run directory has work that other settings would repeat: a finished stage or a trainer's checkpoint."""
    return (
        any((directory / stage.directory / MANIFEST).exists() for stage in STAGES)
        or (directory / "checkpoints").exists()
    )
