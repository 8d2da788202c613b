"""Make the stages of a run in their order; a stage whose artifact exists is skipped."""

from __future__ import annotations

import dataclasses
import pkgutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moedisco_ray.backend import Backend
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.heartbeat import heartbeats
from moedisco_ray.core.stages import STAGES, Stage
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.artifacts import Draft, Manifest, commit, is_done, parse_manifest, read_manifest
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_takeover import collect
from moedisco_ray.core.store.verification import Verifier
from moedisco_ray.execution.checkpoint_folder import made_storage, remove
from moedisco_ray.execution.run_directory import repaired
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.corpus import stage as corpus
from moedisco_ray.stages.evaluate import stage as evaluate


@dataclasses.dataclass(frozen=True)
class Taken:
    """The other run that has given a stage.

    Attributes:
        run: Name of the run.
        offer: Its place among the runs that were offered, from 0.
    """

    run: str
    offer: int


def is_made(store: RunStore, digests: dict[str, str]) -> bool:
    """Whether the artifacts of all stages exist, with these fingerprints by stage."""
    return len(_made(store, digests)) == len(STAGES)


def _made(store: RunStore, digests: dict[str, str]) -> list[Stage]:
    """Stages that need not be made again."""
    found = {stage.name: manifest_of(stage, store) for stage in STAGES}
    return [stage for stage in STAGES if is_done(found[stage.name], digests[stage.name], inputs_of(stage, found))]


def inputs_of(stage: Stage, manifests: Mapping[str, Manifest | None]) -> dict[str, str]:
    """Checksum of each artifact that a stage is made from; if a repaired one differs, the stage is made again."""
    return {name: manifest.content for name in stage.earlier if (manifest := manifests[name]) is not None}


def manifest_of(stage: Stage, store: RunStore) -> Manifest | None:
    """The manifest of a stage's artifact in a run; None if it has none."""
    return parse_manifest(store.read(f"{stage.directory}/{MANIFEST}"), stage.directory, str(store.location))


def make_all(
    config: RunConfig,
    store: RunStore,
    digests: dict[str, str],
    taken: Mapping[str, Taken],
    *,
    log: EventLog,
    backend: Backend,
    stop: StopFile,
    check: Callable[[], None],
    verifies: bool,
    repairs: bool,
) -> None:
    """Make every stage whose artifact does not exist, and delete the checkpoints that no stage needs any more.

    Args:
        config: The run's configuration.
        store: Storage of the run.
        digests: Fingerprint of each stage.
        taken: The run that has given a stage, by stage.
        log: Receives the events of the stages.
        backend: Runs the work of the stages.
        stop: File that, once it exists, ends the run.
        check: Raises an error once another driver has taken over the run.
        verifies: Whether stages verify the files that they read.
        repairs: Whether to make the damaged corpora of data owners again.

    Raises:
        DamagedError: A file of the run is damaged.
        RunStopped: The run was asked to end.
        RunError: A stage failed.
    """
    directory = store.directory
    storage, verifier = made_storage(config, store), Verifier(uuid.uuid4().hex, trusts=not verifies)
    contexts = {
        stage.name: Context(
            config=config,
            directory=directory,
            fingerprint=digests[stage.name],
            emit=log,
            backend=backend,
            stop=stop,
            own_storage=storage,
            verifies=verifies,
            attempt=uuid.uuid4().hex,
            verifier=verifier,
        )
        for stage in STAGES
    }
    with heartbeats(log):
        for part in corpus.repair_owners(contexts["corpus"]) if repairs else ():
            log(repaired(part))
            store.delete(f"{part.folder}/{MANIFEST}")
        if verifies and not store.is_remote:
            _verify_early(store, _made(store, digests), evaluate.files_read(contexts["evaluate"]))
        for stage in STAGES:
            stop.check()
            _make(stage, contexts[stage.name], check, taken)
    check()
    if storage is not None:
        remove(storage, log)
    store.remove(directory / "checkpoints")
    collect(store)


def _verify_early(store: RunStore, made: Collection[Stage], files: Iterable[Path]) -> None:
    """Verify what the evaluation will read of stages that are made, if there is training to do before it.

    Otherwise the damage of a file that only the evaluation reads would be found after the training. The evaluation
    verifies the files again. Those of a run at a URI are left to it, as they would have to be downloaded to this
    machine.

    Raises:
        DamagedError: A file is damaged.
    """
    folders = [stage.directory for stage in made]
    if "finetuned" not in folders:
        store.fetch(*(path for path in files if str(store.name_of(path)).partition("/")[0] in folders))


@dataclasses.dataclass(frozen=True)
class _CheckedStore:
    """Commits directories of a run as long as no other driver has taken over the run."""

    store: RunStore
    check: Callable[[], None]

    def draft(self, directory: Path) -> Path:
        return self.store.draft(directory)

    def replace(self, draft: Path, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.store.replace(draft, directory, manifest, self.check)


def skipped(stage: Stage, taken: Mapping[str, Taken]) -> Event:
    """The event of a stage that exists, or was taken from another run."""
    return Event("stage_skipped", stage.name, data=dataclasses.asdict(taken[stage.name]) if stage.name in taken else {})


def _make(stage: Stage, context: Context, check: Callable[[], None], taken: Mapping[str, Taken]) -> None:
    artifact = context.directory / stage.directory
    inputs = inputs_of(stage, {each.name: read_manifest(context.directory / each.directory) for each in STAGES})
    if is_done(read_manifest(artifact), context.fingerprint, inputs):
        context.emit(skipped(stage, taken))
        return
    context.emit(Event("stage_started", stage.name))
    make: Callable[[Context, Draft], None] = pkgutil.resolve_name(stage.work)
    with commit(artifact, context.fingerprint, _CheckedStore(context.store, check), stage.name, inputs) as draft:
        make(context, draft)
    check()
    # Trainers' checkpoints are kept until the artifact made from them is committed.
    context.store.remove(context.checkpoints(stage.name))
    collect(context.store)
    if context.own_storage is not None:
        remove(context.storage(stage.name), context.emit)
    manifest = read_manifest(artifact)
    if manifest is not None:
        context.emit(
            Event("stage_finished", stage.name, data={"seconds": manifest.seconds, "summary": manifest.summary})
        )
