"""A run from its configuration to a Hugging Face directory, in a directory that it locks while it is active."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from moedisco_ray.backend import Backend
from moedisco_ray.core import stages
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import MoeDiscoError, RunDirError, RunStopped, UserError
from moedisco_ray.core.records.apart import of_result
from moedisco_ray.core.records.events import BILL_FIGURES, Emit, Event, EventLog
from moedisco_ray.core.records.findings import worse_than_start
from moedisco_ray.core.records.prices import PriceTag
from moedisco_ray.core.records.report import report_of
from moedisco_ray.core.records.run_damage import EVENTS
from moedisco_ray.core.records.ways import Alternative
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.store.artifacts import reporting_full_disk, run_id, write_json
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.core.store.lease import leased
from moedisco_ray.core.store.live_files import LiveFiles
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_takeover import begin
from moedisco_ray.core.user_code import check_allowed
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.backend import RayBackend
from moedisco_ray.execution.ray.causes import reporting_full_disk_of_a_task
from moedisco_ray.execution.ray.monitoring import Gauges, reporting_idle_slots
from moedisco_ray.execution.reuse import Donors, donors, reuse
from moedisco_ray.execution.run_directory import (
    CONFIG,
    Adoption,
    check_directory,
    create,
    repair,
    replaced_settings,
    reporting_unwritable,
    write_config,
)
from moedisco_ray.execution.stage_sequence import is_made, make_all, skipped
from moedisco_ray.plan.resolve import resolve
from moedisco_ray.stages.corpus import input_identity
from moedisco_ray.stages.export.card import write_card
from moedisco_ray.stages.start import check_start

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
    ways: Sequence[Alternative] = (),
    reuses: Sequence[Location] = (),
    lenient: bool = False,
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
        ways: The ways to train the model that a plan has compared, for the verdict of the finished run.
        reuses: Directories or URIs of other runs, from which stages are taken that would be made alike.
        lenient: Whether to pass over other runs in `reuses` that are damaged or gone; else they are errors.

    Returns:
        The run directory.

    Raises:
        DamagedError: A file of the run is damaged.
        UserError: A mistake that the user can correct; no partial output is left.
        RunError: The run failed; the same call continues from what is stored.
        RunStopped: The run was asked to end.
    """
    check_allowed(config, functions)
    resolved = resolve(config)
    config = resolved.config
    others = donors(reuses, config, lenient=lenient)
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
        sentences = (*resolved.remarks(), *others.remarks())
        remarks += [Event("warning", data={"message": each}) for each in sentences]
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
                    ways=ways,
                    others=others,
                )
        except RunStopped as error:
            log(Event("run_stopped", data={"reason": error.reason}))
            raise
        except MoeDiscoError as error:
            with contextlib.suppress(OSError):  # a full disk may have no room for this event either
                log(Event("run_failed", data=_failure(error)))
            raise
        finally:
            log.close()
    return directory


def _failure(error: MoeDiscoError) -> dict[str, str]:
    about = {"field": error.field} if isinstance(error, UserError) else {}
    return {"message": str(error), "error": type(error).__name__, **about}


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


def is_finished(config: RunConfig, functions: Collection[str] = ()) -> bool:
    """Whether all artifacts of the configuration exist in its directory; `functions` is that of `run`."""
    check_allowed(config, functions)
    config = resolve(config).config
    return is_made(RunStore.of(config.location), stages.fingerprints(config, input_identity(config)))


def claim(config: RunConfig, redo: bool) -> Path:
    """Create the run directory, and write the configuration there.

    Raises:
        RunDirError: The directory holds a run with other settings, or cannot be written.
    """
    check_directory(config, redo=redo)
    create(config.directory)
    write_config(config)
    return config.directory


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
    ways: Sequence[Alternative],
    others: Donors,
) -> None:
    started, directory = time.time(), store.directory
    make_stages = functools.partial(
        make_all, config, store, log=log, stop=stop, check=check, verifies=verifies, repairs=repairs
    )
    log(
        Event(
            "run_started",
            data={
                "id": run_id(directory, given_id),
                "name": config.name,
                "directory": str(directory),
                "stages": [stage.name for stage in STAGES],
                "ways": [each.model_dump(mode="json") for each in ways],
            },
        )
    )
    for remark in remarks:  # after the start: what an interrupted attempt held is paid until its last event
        log(remark)
    digests = stages.fingerprints(config, input_identity(config))
    store.publish(directory / "run.json")
    taken, unusable = reuse(store, others, digests, check)
    for sentence in unusable:
        log(Event("warning", data={"message": sentence}))
    if not is_made(store, digests) or (repairs and config.owners):  # only the owners' nodes can verify their files
        check_start(config)
        if backend is not None:
            make_stages(digests, taken, backend=backend)
        else:
            with reporting_full_disk_of_a_task(directory), session.ray_cluster(config, log) as messages:
                for message in messages:
                    log(Event("warning", data={"message": message}))
                earlier = EventLog.read(directory / EVENTS)
                log.listen(Gauges(config, earlier))
                with (
                    RayBackend(config, _namespace(store), stop, earlier) as ray_backend,
                    reporting_idle_slots(config, log, ray_backend.idle_seats),
                ):
                    ray_backend.examine_new_cards(config, log, store)
                    make_stages(digests, taken, backend=ray_backend)
    else:
        for stage in STAGES:
            log(skipped(stage, taken))
    last = Event("run_finished", data={"seconds": round(time.time() - started, 3)})
    report = report_of(store.read_newest, config, last)
    write_json(directory / "report.json", with_checksum(report.to_json()))
    model = directory / stages.stage_named("export").directory
    write_card(model, report)
    check()
    store.amend(model / "README.md")
    store.publish(directory / "report.json")
    worse = worse_than_start(of_result(report.evaluation), report.evaluation.start)
    totals = {"bill": {key: getattr(report.bill, key) for key in BILL_FIGURES}}
    log(dataclasses.replace(last, data=last.data | totals | ({} if worse is None else {"worse_than_start": worse})))
    # Trackers write their last files when they receive the last event.
    store.publish(*(path for path in (directory / "tensorboard", *directory.glob("figures/*.png")) if path.exists()))


def _namespace(store: RunStore) -> str:
    """Ray namespace of the run's actors, which all its drivers share, but no copy of its directory."""
    place = hashlib.sha256(str(store.location).encode()).hexdigest()[:8]
    return f"moedisco-{run_id(store.directory)}-{place}"


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
