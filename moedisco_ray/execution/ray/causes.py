"""Finds the cause of a Ray error, from the exception's type, or from its message if the type is not specific.

A message may hold a traceback, with paths and source lines whose words say nothing about the cause.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import ray
from ray.exceptions import NodeDiedError, OutOfDiskError, RayActorError, RayError, RayTaskError
from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from moedisco_ray.core.errors import DiskFullError
from moedisco_ray.core.store.artifacts import disk_full
from moedisco_ray.execution.ray.ray_train_internals import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.retrying import End, kind_of

NODE_DEATH_SECONDS = 25.0
"""Seconds until Ray declares a node dead: after a first delay, five health checks fail, three seconds apart."""
_CONNECTION_LOST = re.compile(r"actor \S+ is unavailable|connection (closed|reset)|gloo|nccl", re.IGNORECASE)
"""Error texts of workers that lost the connection to another worker, whose process or node may have ended before Ray
knows."""
_NODE_GONE = re.compile(
    r"node (has died|was (forcibly )?(terminated|preempted)|is dead|died|is being drained)|\b(by|node) preemption",
    re.IGNORECASE,
)
"""Ray's error texts for an actor that died with its node."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers (`errno`) of a full disk and of an exceeded disk quota."""
_NO_SPACE = re.compile(rf"\[[Ee]rrno ({errno.ENOSPC}|{errno.EDQUOT})\]|No space left on device|Disk quota exceeded")
_OTHER_CAUSES = (OutOfDiskError, ImportError, NameError, AttributeError, TypeError, LookupError)
"""Errors that no GPU and no machine causes. A broken machine raises `OSError` too."""
_RAY_DISK = (
    "the disk that Ray keeps its files on is full; free some space there, or name another directory with this "
    "variable, and run the command again"
)


def failures_of(error: TrainingFailedError) -> list[BaseException]:
    """The errors that ended the workers of a Ray Train run, or kept them from starting."""
    if isinstance(error, WorkerGroupError):
        return [unwrapped(failure) for failure in error.worker_failures.values()]
    return [unwrapped(error.controller_failure) if isinstance(error, ControllerError) else error]


def end_of(failures: Sequence[BaseException], status: UnitStatus, dead_before: Collection[str] = ()) -> End:
    """How an attempt ended, from the errors of its workers.

    Args:
        failures: The errors that ended the workers; empty if they ended without an error and without a result.
        status: Last known state of the training.
        dead_before: Ids of the nodes that were dead when the attempt began.
    """
    if not failures:
        return End("failed", status.current_step, "its worker ended without a result; see the Ray logs")
    words = " ".join(f"{type(failure).__name__}: {failure}" for failure in failures)
    start_failed = any(isinstance(failure, WorkerGroupStartupFailedError) for failure in failures)
    no_slots = any(isinstance(failure, WorkerGroupStartupTimeoutError) for failure in failures)
    node_lost = (
        any(isinstance(failure, PreemptionError) or node_gone(failure) for failure in failures)
        or not _stay_alive(status.nodes, NODE_DEATH_SECONDS if _CONNECTION_LOST.search(words) else 0.0)
        or no_slots
        or (start_failed and _another_node_dies(dead_before))
    )
    reason = "; ".join(sorted({last_line(failure) for failure in failures}))
    kind = kind_of(words, node_lost=node_lost)
    # The other workers of a gang only report that they lost the one that died.
    died = kind == "failed" and (start_failed or any(isinstance(failure, RayActorError) for failure in failures))
    return End("died" if died else kind, status.current_step, reason, saved=no_slots)


def may_be_of_the_card(failures: Sequence[BaseException]) -> bool:
    """Whether a GPU, or a machine, may be the cause of errors: not of a full disk, or of a mistake in code."""
    return not any(isinstance(failure, _OTHER_CAUSES) or _is_full(failure) for failure in failures)


def _is_full(error: BaseException) -> bool:
    """Whether an error is of a full disk; if it was wrapped, its text alone may say so."""
    return getattr(error, "errno", None) in FULL or _NO_SPACE.search(str(error)) is not None


def _stay_alive(nodes: Collection[str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while set(nodes) <= {entry["NodeID"] for entry in ray.nodes() if entry["Alive"]}:
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.5)
    return False


def dead_nodes() -> set[str]:
    """Ids of the Ray cluster's dead nodes."""
    return {entry["NodeID"] for entry in ray.nodes() if not entry["Alive"]}


def _another_node_dies(before: Collection[str]) -> bool:
    """Whether another node is dead, or is found dead within the time that Ray needs to notice."""
    deadline = time.monotonic() + NODE_DEATH_SECONDS
    while dead_nodes() <= set(before):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def last_line(error: BaseException) -> str:
    """The last line of an error's text, where Ray puts the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def unwrapped(error: BaseException) -> BaseException:
    """The error that ended a worker, without Ray's wrappers."""
    while isinstance(error, WorkerHealthCheckFailedError | RayTaskError):
        error = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error.cause
    return error


def node_gone(error: BaseException) -> bool:
    """Whether an error says that a node is gone or about to go."""
    deaths = [cause for cause in _chain(error) if isinstance(cause, RayActorError | NodeDiedError)]
    if deaths:
        return any(_died_with_node(death) for death in deaths)
    # For a worker that dies during its start, Ray Train gives no error type, only text that ends with Ray's words.
    return bool(_NODE_GONE.search(last_line(error)))


@contextlib.contextmanager
def reporting_full_disk_of_a_task(directory: Path) -> Iterator[None]:
    """Turn a Ray error that a full disk caused into a user error.

    Raises:
        DiskFullError: The disk of the run directory, or of Ray's own files, is full.
    """
    try:
        yield
    except RayError as error:
        causes = list(_chain(error))
        if any(isinstance(cause, OutOfDiskError) for cause in causes):
            raise DiskFullError("RAY_TMPDIR", None, _RAY_DISK) from error
        if any(map(_is_full, [error, *causes])):
            raise disk_full(directory) from error
        raise


def _died_with_node(death: BaseException) -> bool:
    if isinstance(death, NodeDiedError) or (isinstance(death, RayActorError) and death.preempted):
        return True
    # If the actor's constructor failed, the text is the constructor's traceback.
    constructed = isinstance(death, RayActorError) and not death.actor_init_failed
    return constructed and bool(_NODE_GONE.search(str(death)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, as far as Ray keeps them."""
    found: BaseException | None = error
    while found is not None:
        found = unwrapped(found)
        yield found
        found = found.__cause__
