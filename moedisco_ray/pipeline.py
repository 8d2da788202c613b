"""A run from its configuration to a Hugging Face directory: the stages in order, each skipped when its artifact is there."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from moedisco_ray import stages
from moedisco_ray.artifacts import Draft, commit, disk_full, is_done, read_json, read_manifest, write_json
from moedisco_ray.config import RunConfig
from moedisco_ray.corpus import input_identity
from moedisco_ray.errors import MoeDiscoError, RunDirError
from moedisco_ray.events import Emit, Event, EventLog
from moedisco_ray.on_ray import session
from moedisco_ray.on_ray.shell import RayShell
from moedisco_ray.report import build_report
from moedisco_ray.shell import Shell
from moedisco_ray.stages import STAGES, Stage
from moedisco_ray.steps import STEPS, Context


def run(config: RunConfig, listeners: tuple[Emit, ...] = (), redo: bool = False, shell: Shell | None = None) -> Path:
    """Carry a run to its end, from wherever an earlier attempt left it.

    Args:
        config: A checked configuration.
        listeners: Get every event as it happens.
        redo: Accept that the directory holds a run with other settings, and make again what they change.
        shell: Runs the work; None: Ray, on the cluster that is there or a local one.

    Returns:
        The run directory.

    Raises:
        UserError: Something the user can mend; nothing half-written is left.
        RunError: The run failed; the same call goes on from the last checkpoint.
    """
    directory = claim(config, redo)
    log = EventLog(directory / "events.jsonl", listeners)
    started = time.time()
    try:
        log(Event("run_started", data={"name": config.name, "directory": str(directory), "stages": [s.name for s in STAGES]}))
        digests = stages.fingerprints(config, input_identity(config))
        if not all(is_done(directory / stage.directory, digests[stage.name]) for stage in STAGES):
            if shell is not None:
                _make_all(config, directory, digests, log, shell)
            else:
                with session.cluster(config):
                    _make_all(config, directory, digests, log, RayShell())
        else:
            for stage in STAGES:
                log(Event("stage_skipped", stage.name))
        write_json(directory / "report.json", build_report(directory, config))
        log(Event("run_finished", data={"seconds": round(time.time() - started, 3)}))
    except MoeDiscoError as error:
        log(Event("run_failed", data={"message": str(error)}))
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(directory) from error
        raise
    finally:
        log.close()
    return directory


def claim(config: RunConfig, redo: bool) -> Path:
    """Make the run directory this run's, and write its configuration there.

    Raises:
        RunDirError: It holds a run with other settings, or cannot be written.
    """
    directory = config.directory
    path = directory / "config.json"
    if path.exists():
        changed = stages.changed_settings(read_json(path), config)
        if changed and not redo:
            raise RunDirError(
                "output", str(directory),
                f"holds a run with other settings ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}); "
                "choose another name, or pass --redo to make again what they change")
    elif directory.exists() and any(directory.iterdir()):
        raise RunDirError("output", str(directory), "is not empty and holds no run; choose another name")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, config.model_dump(mode="json"))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(directory) from error
        raise RunDirError("output", str(directory), f"cannot be written ({error.strerror})") from error
    return directory


def _make_all(config: RunConfig, directory: Path, digests: dict[str, str], emit: Emit, shell: Shell) -> None:
    for stage in STAGES:
        if is_done(directory / stage.directory, digests[stage.name]):
            emit(Event("stage_skipped", stage.name))
            continue
        emit(Event("stage_started", stage.name))
        context = Context(config, directory, digests[stage.name], emit, shell)
        _make(stage, context, STEPS[stage.name])
        manifest = read_manifest(directory / stage.directory)
        if manifest is not None:
            emit(Event("stage_finished", stage.name, data={"seconds": manifest.seconds, "summary": manifest.summary}))
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def _make(stage: Stage, context: Context, step: Callable[[Context, Draft], None]) -> None:
    with commit(context.directory / stage.directory, context.fingerprint) as draft:
        step(context, draft)
    # Trainers' checkpoints are kept until what they led to is committed.
    shutil.rmtree(context.checkpoints(stage.name), ignore_errors=True)


