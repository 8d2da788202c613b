"""A run from its configuration to a Hugging Face directory: all stages in order.

A stage whose artifact exists is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moedisco_ray.backend import Backend
from moedisco_ray.core import stages
from moedisco_ray.core.artifacts import (
    Draft,
    Manifest,
    commit,
    is_done,
    parse_manifest,
    read_manifest,
    reporting_full_disk,
    run_id,
    write_json,
)
from moedisco_ray.core.checksums import with_checksum, without_checksum
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.starts import pinned, settled, with_recorded_count
from moedisco_ray.core.errors import DamagedError, MoeDiscoError, RunDirError, RunStopped, StorageError
from moedisco_ray.core.events import BILL_FIGURES, Emit, Event, EventLog
from moedisco_ray.core.findings import worse_than_start
from moedisco_ray.core.heartbeat import heartbeats
from moedisco_ray.core.lease import leased
from moedisco_ray.core.live_files import LiveFiles
from moedisco_ray.core.locations import Location, joined
from moedisco_ray.core.manifests import MANIFEST
from moedisco_ray.core.prices import PriceTag
from moedisco_ray.core.report import report_of
from moedisco_ray.core.run_damage import EVENTS, STORAGE
from moedisco_ray.core.run_store import RunStore
from moedisco_ray.core.run_takeover import begin, collect
from moedisco_ray.core.stages import STAGES, Stage
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.user_code import check_allowed
from moedisco_ray.core.verification import Verifier
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.backend import RayBackend
from moedisco_ray.execution.ray.causes import reporting_full_disk_of_a_task
from moedisco_ray.execution.ray.monitoring import Gauges, reporting_idle_slots
from moedisco_ray.execution.run_directory import (
    CONFIG,
    Adoption,
    check_directory,
    create,
    repair,
    repaired,
    replaced_settings,
    reporting_unwritable,
    write_config,
)
from moedisco_ray.plan import fitted, with_cluster_count
from moedisco_ray.plan.fitting import changes
from moedisco_ray.stages import decompose
from moedisco_ray.stages.clustering import stage as clustering
from moedisco_ray.stages.clustering.model import ClusterModel
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.corpus import input_identity
from moedisco_ray.stages.corpus import stage as corpus
from moedisco_ray.stages.corpus.unseen import read_unseen
from moedisco_ray.stages.evaluate import stage as evaluate
from moedisco_ray.stages.export import stage as export
from moedisco_ray.stages.export.card import write_card
from moedisco_ray.stages.merge import stage as merge
from moedisco_ray.stages.start import check_start
from moedisco_ray.stages.train import finetune, seed, submodels
from moedisco_ray.training.checkpoints import checkpoint

RUN: Mapping[str, Callable[[Context, Draft], None]] = {
    "corpus": corpus.run,
    "seed": functools.partial(seed.run, write_common_start=decompose.write_common_start),
    "cluster": clustering.run,
    "decompose": decompose.run,
    "submodels": submodels.run,
    "merge": merge.run,
    "finetune": finetune.run,
    "evaluate": functools.partial(evaluate.run, readers=evaluate.Readers(ClusterModel.load, read_unseen)),
    "export": export.run,
}
"""The function of each stage, by name. Stages do not import each other: a function that one stage needs from another is
passed to it here."""

_LOCK_SECONDS = 60.0
"""Seconds that a run waits for its own earlier process to release the run directory."""


def run(
    config: RunConfig,
    listeners: tuple[Emit, ...] = (),
    redo: bool = False,
    backend: Backend | None = None,
    stop: StopFile = NEVER,
    given_id: str | None = None,
    functions: Collection[str] = (),
    *,
    prices: PriceTag | None = None,
    verifies: bool = True,
    repairs: bool = False,
) -> Path:
    """Complete a run, from the state that an earlier attempt left.

    Args:
        config: A checked configuration.
        listeners: Receive every event as it happens.
        redo: Whether to accept a run directory made with other settings, and repeat the stages that depend on the
            changed ones.
        backend: Runs the work of the stages. If it is None, Ray runs the work, on an existing Ray cluster or a local
            one.
        stop: File that, once it exists, makes the run save checkpoints and end.
        given_id: Id for a new run, such as the one that a service gave it; random by default. A resumed run keeps its
            id.
        functions: Functions of the user that the run may call, as MODULE or MODULE:FUNCTION; calling them runs their
            code.
        prices: What slots cost, which may change while the run is active; by default the configuration's prices.
        verifies: Whether stages verify the files that they read.
        repairs: Whether to make damaged stages again, and those after them unless the result is the same.

    Returns:
        The run directory.

    Raises:
        DamagedError: A file of the run is damaged.
        UserError: A mistake that the user can correct; no partial output is left.
        RunError: The run failed; the same call continues from what is stored.
        RunStopped: The run was asked to end.
    """
    check_allowed(config, functions)
    given = with_cluster_count(settled(config))
    config = fitted(given)
    store, seconds = RunStore.of(config.location), _LOCK_SECONDS if stop.path else 0.0
    directory = store.directory
    with contextlib.ExitStack() as stack:
        check = _taken_over(store, seconds, stack)
        check_directory(config, redo=redo or repairs)
        create(directory)
        stack.enter_context(_locked(directory, seconds))
        remarks = list(repair(config, store)) if repairs and (directory / CONFIG).exists() else []
        check_directory(config, redo=redo)  # again: another process may have worked on the run until now
        adopts_later = bool(replaced_settings(config))
        if not adopts_later:
            store.publish(write_config(config))
        stack.enter_context(LiveFiles(store, (EVENTS, "ray.log"), check))
        log = EventLog(directory / EVENTS, listeners, prices or PriceTag(config.pools))
        if adopts_later:
            log.listen(Adoption(config, store))
        remarks += [Event("warning", data={"message": each}) for each in _chosen(given, config)]
        try:
            with reporting_full_disk(directory):
                _complete(
                    config,
                    store,
                    log,
                    backend=backend,
                    stop=stop,
                    given_id=given_id,
                    check=check,
                    remarks=remarks,
                    verifies=verifies,
                    repairs=repairs,
                )
        except RunStopped as error:
            log(Event("run_stopped", data={"reason": error.reason}))
            raise
        except MoeDiscoError as error:
            with contextlib.suppress(OSError):  # a full disk may have no room for this event either
                log(Event("run_failed", data={"message": str(error)}))
            raise
        finally:
            log.close()
    return directory


def _taken_over(store: RunStore, seconds: float, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Take the lease of a run at a URI, and update this machine's working copy.

    Returns:
        A function that raises an error once another driver has taken over the run.
    """
    if not store.is_remote:
        return lambda: None
    lease = stack.enter_context(leased(store, seconds))
    begin(store, [stage.directory for stage in STAGES], fresh=lease.fresh)
    return lease.check


def _chosen(given: RunConfig, used: RunConfig) -> Iterator[str]:
    """A sentence about each training with other settings than the configuration has."""
    for name, section in (("sub-models", "submodels"), ("the fine-tune's weights", "finetune")):
        before, after = getattr(given, section).optimizer, getattr(used, section).optimizer
        settings = changes(before, after, f"{section}.optimizer")
        if settings:
            yield f"{name} do not fit their cards as configured; the run uses {', '.join(settings)}"


def is_finished(config: RunConfig, functions: Collection[str] = ()) -> bool:
    """Whether all artifacts of the configuration exist in its directory; `functions` is that of `run`."""
    check_allowed(config, functions)
    config = fitted(with_cluster_count(with_recorded_count(pinned(config))))
    return _is_made(RunStore.of(config.location), stages.fingerprints(config, input_identity(config)))


def _is_made(store: RunStore, digests: dict[str, str]) -> bool:
    return len(_made(store, digests)) == len(STAGES)


def _made(store: RunStore, digests: dict[str, str]) -> list[Stage]:
    """Stages that need not be made again."""
    found = {stage.name: _manifest(stage, store) for stage in STAGES}
    return [stage for stage in STAGES if is_done(found[stage.name], digests[stage.name], _inputs(stage, found))]


def _inputs(stage: Stage, manifests: Mapping[str, Manifest | None]) -> dict[str, str]:
    """Checksum of each artifact from which a stage is made: if a repaired one is not the same, the stage is made again, too."""
    return {name: manifest.content for name in stage.earlier if (manifest := manifests[name]) is not None}


def _manifest(stage: Stage, store: RunStore) -> Manifest | None:
    return parse_manifest(store.read(f"{stage.directory}/{MANIFEST}"), stage.directory, str(store.location))


def _complete(
    config: RunConfig,
    store: RunStore,
    log: EventLog,
    *,
    backend: Backend | None,
    stop: StopFile,
    given_id: str | None,
    check: Callable[[], None],
    remarks: Iterable[Event],
    verifies: bool,
    repairs: bool,
) -> None:
    started, directory = time.time(), store.directory
    make_all = functools.partial(
        _make_all, config, store, log=log, stop=stop, check=check, verifies=verifies, repairs=repairs
    )
    log(
        Event(
            "run_started",
            data={
                "id": run_id(directory, given_id),
                "name": config.name,
                "directory": str(directory),
                "stages": [stage.name for stage in STAGES],
            },
        )
    )
    for remark in remarks:  # after the start: what an interrupted attempt held is paid until its last event
        log(remark)
    digests = stages.fingerprints(config, input_identity(config))
    store.publish(directory / "run.json")
    if not _is_made(store, digests) or (repairs and config.owners):  # only the owners' nodes can verify their files
        check_start(config)
        if backend is not None:
            make_all(digests, backend=backend)
        else:
            with reporting_full_disk_of_a_task(directory), session.ray_cluster(config, log) as messages:
                for message in messages:
                    log(Event("warning", data={"message": message}))
                log.listen(Gauges(config, EventLog.read(directory / EVENTS)))
                with RayBackend(config) as ray_backend, reporting_idle_slots(config, log, ray_backend.idle_seats):
                    make_all(digests, backend=ray_backend)
    else:
        for stage in STAGES:
            log(Event("stage_skipped", stage.name))
    last = Event("run_finished", data={"seconds": round(time.time() - started, 3)})
    report = report_of(store.read_newest, config, last)
    write_json(directory / "report.json", with_checksum(report.to_json()))
    model = directory / STAGES[-1].directory
    write_card(model, report)
    check()
    store.amend(model / "README.md")
    store.publish(directory / "report.json")
    worse = worse_than_start(report.evaluation, report.evaluation.start)
    totals = {"bill": {key: getattr(report.bill, key) for key in BILL_FIGURES}}
    log(dataclasses.replace(last, data=last.data | totals | ({} if worse is None else {"worse_than_start": worse})))
    # Trackers write their last files when they receive the last event.
    store.publish(*(path for path in (directory / "tensorboard", *directory.glob("figures/*.png")) if path.exists()))


@contextlib.contextmanager
def _locked(directory: Path, seconds: float) -> Iterator[None]:
    """Lock a run directory for this process, waiting for another process to release it.

    Raises:
        RunDirError: Another process still holds the lock when the wait is over.
    """
    with reporting_unwritable(directory):
        file = (directory / EVENTS).open("a", encoding="utf-8")
    with file as lock:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    remedy = "another process works on this run; wait for it, or end it"
                    raise RunDirError("output", str(directory), remedy) from error
                time.sleep(0.2)
        yield


def claim(config: RunConfig, redo: bool) -> Path:
    """Create the run directory, and write the configuration there.

    Raises:
        RunDirError: The directory holds a run with other settings, or cannot be written.
    """
    check_directory(config, redo=redo)
    create(config.directory)
    write_config(config)
    return config.directory


def _make_all(
    config: RunConfig,
    store: RunStore,
    digests: dict[str, str],
    log: EventLog,
    *,
    backend: Backend,
    stop: StopFile,
    check: Callable[[], None],
    verifies: bool,
    repairs: bool,
) -> None:
    directory = store.directory
    storage, verifier = _made_storage(config, store), Verifier(uuid.uuid4().hex, trusts=not verifies)
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
            _make(stage, contexts[stage.name], check)
    check()
    if storage is not None:
        _remove(storage, log)
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


def _made_storage(config: RunConfig, store: RunStore) -> Location | None:
    """Like `own_storage`, but name a folder first.

    A random part makes its name unique: other runs may have the same name.
    """
    path = store.directory / STORAGE
    if config.checkpoint.storage is not None:
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json(path, with_checksum({"folder": f"{config.name}-{uuid.uuid4().hex[:12]}"}))
        store.publish(path)
    return own_storage(config, store)


@dataclasses.dataclass(frozen=True)
class _CheckedStore:
    """Commits directories of a run as long as no other driver has taken over the run."""

    store: RunStore
    check: Callable[[], None]

    def draft(self, directory: Path) -> Path:
        return self.store.draft(directory)

    def replace(self, draft: Path, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.store.replace(draft, directory, manifest, self.check)


def _make(stage: Stage, context: Context, check: Callable[[], None]) -> None:
    artifact = context.directory / stage.directory
    inputs = _inputs(stage, {each.name: read_manifest(context.directory / each.directory) for each in STAGES})
    if is_done(read_manifest(artifact), context.fingerprint, inputs):
        context.emit(Event("stage_skipped", stage.name))
        return
    context.emit(Event("stage_started", stage.name))
    with commit(artifact, context.fingerprint, _CheckedStore(context.store, check), stage.name, inputs) as draft:
        RUN[stage.name](context, draft)
    check()
    # Trainers' checkpoints are kept until the artifact made from them is committed.
    context.store.remove(context.checkpoints(stage.name))
    collect(context.store)
    if context.own_storage is not None:
        _remove(context.storage(stage.name), context.emit)
    manifest = read_manifest(artifact)
    if manifest is not None:
        context.emit(
            Event("stage_finished", stage.name, data={"seconds": manifest.seconds, "summary": manifest.summary})
        )


def _remove(checkpoints: Location, emit: Emit) -> None:
    try:
        checkpoint.remove(checkpoints)
    except StorageError as error:  # not fatal: the artifact made from them exists
        emit(Event("warning", data={"message": f"checkpoints are left over: {error}"}))
