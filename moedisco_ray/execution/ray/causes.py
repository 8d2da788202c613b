"""What is behind an error of Ray, by its type wherever Ray gives it one.

The text of an error may hold a traceback, and with it paths and source lines, whose words say nothing of what happened.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import NodeDiedError, OutOfDiskError, RayActorError, RayError, RayTaskError

from moedisco_ray.core.artifacts import disk_full
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.execution.ray.ray_internals import WorkerHealthCheckFailedError
from moedisco_ray.execution.ray.train_callbacks import last_line

_NODE_GONE = re.compile(
    r"node (has died|was (forcibly )?(terminated|preempted)|is dead|died|is being drained)|\b(by|node) preemption", re.IGNORECASE)
"""In the words of Ray, whose actor died with its node."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = re.compile(rf"\[[Ee]rrno ({errno.ENOSPC}|{errno.EDQUOT})\]|No space left on device|Disk quota exceeded")
_RAY_DISK = (
    "the disk that Ray keeps its files on is full; free some space there, or name another directory with this variable, and run "
    "the same command again: it resumes")


def unwrapped(error: BaseException) -> BaseException:
    """What ended a worker, without what Ray has put around it."""
    while isinstance(error, WorkerHealthCheckFailedError | RayTaskError):
        error = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error.cause
    return error


def node_gone(error: BaseException) -> bool:
    """Whether an error says that a node is gone, or about to go."""
    deaths = [cause for cause in _chain(error) if isinstance(cause, RayActorError | NodeDiedError)]
    if deaths:
        return any(_with_its_node(death) for death in deaths)
    # Of a worker that dies as it starts, Ray Train has but the words, and those at the end of a traceback.
    return bool(_NODE_GONE.search(last_line(error)))


@contextlib.contextmanager
def reporting_full_disk_of_a_task(directory: Path) -> Iterator[None]:
    """Turn an error of Ray behind which is a full disk, in a task or under Ray itself, into the user's.

    Raises:
        RunDirError: A disk is full: the run directory's, or the one that Ray keeps its files on.
    """
    try:
        yield
    except RayError as error:
        causes = list(_chain(error))
        if any(isinstance(cause, OutOfDiskError) for cause in causes):
            raise RunDirError("RAY_TMPDIR", None, _RAY_DISK) from error
        # Ray Data wraps what a task raised, and keeps of it the text alone.
        if any(getattr(cause, "errno", None) in _FULL for cause in causes) or _NO_SPACE.search(str(error)):
            raise disk_full(directory) from error
        raise


def _with_its_node(death: BaseException) -> bool:
    if isinstance(death, NodeDiedError) or (isinstance(death, RayActorError) and death.preempted):
        return True
    # The text of an actor whose making failed is the traceback of that.
    made = isinstance(death, RayActorError) and not death.actor_init_failed
    return made and bool(_NODE_GONE.search(str(death)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and each that it was raised from, as far as Ray has kept them."""
    found: BaseException | None = error
    while found is not None:
        found = unwrapped(found)
        yield found
        found = found.__cause__
