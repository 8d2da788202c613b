"""An error of Ray is taken by its type; words count only where they are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfDiskError, RayTaskError, UserCodeException

from moedisco_ray.core.errors import RunDirError
from moedisco_ray.execution.ray.causes import may_be_of_the_card, node_gone, reporting_full_disk_of_a_task, unwrapped
from moedisco_ray.execution.ray.ray_train_internals import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError

TRACEBACK = """Traceback (most recent call last):
  File "/srv/node preemption/loop.py", line 7, in after_preemption
    step(job)   # out of memory, or the node has died
"""
NODE = "The actor died because its node has died. Node Id: 5d\n\tthe actor's node was"
NODE_DIED = f"{NODE} terminated unexpectedly: no heartbeat"
NODE_PREEMPTED = f"{NODE} preempted: a notice"
NO_NODE = (
    "Task failed because the node it was running on is dead or unavailable. Node IP: 10.0.0.7, node ID: 5d. "
    "This can happen if the node was preempted, had a hardware failure, or its raylet crashed unexpectedly."
)
STARTS = "One of the worker actors failed to initialize due to error:\n"


def actor_died(message: str, reason: int = NodeDeathInfo.UNSPECIFIED) -> ActorDiedError:
    return ActorDiedError(
        ActorDiedErrorContext(
            error_message=message,
            actor_id=bytes(16),
            class_name="RayTrainWorker",
            node_death_info=NodeDeathInfo(reason=reason),
        )
    )


def of_task(cause: Exception) -> RayTaskError:
    """Its text is the traceback."""
    return RayTaskError(
        "step", f"{TRACEBACK}{type(cause).__name__}: {cause}", cause, proctitle="ray::step", pid=1, ip="10.0.0.7"
    )


def raised(cause: Exception) -> RayTaskError:
    """As Ray raises it: of its cause's type too."""
    return of_task(cause).as_instanceof_cause()


def raised_from(cause: Exception) -> RuntimeError:
    error = RuntimeError("the others are silent")
    error.__cause__ = cause
    return error


class Preempted(Exception):  # noqa: N818 - a user's, with a name of theirs
    preempted = True


@pytest.mark.parametrize(
    "error",
    [
        actor_died(NODE_DIED),
        actor_died(NODE_PREEMPTED),
        actor_died("", NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED),
        NodeDiedError(NO_NODE),
        raised(NodeDiedError(NO_NODE)),
        WorkerHealthCheckFailedError("", NodeDiedError(NO_NODE)),
        WorkerHealthCheckFailedError("", raised(actor_died(NODE_DIED))),
        raised_from(actor_died(NODE_PREEMPTED)),
        WorkerGroupStartupFailedError(f"{STARTS}{TRACEBACK}ray.exceptions.ActorDiedError: {NODE_DIED}"),
        RuntimeError("the node has died"),
    ],
)
def test_a_node_that_went_is_told_by_type_or_in_the_last_line(error: Exception) -> None:
    assert node_gone(error)


@pytest.mark.parametrize(
    "error",
    [
        of_task(ValueError("bug")),
        raised(ValueError("bug")),
        WorkerHealthCheckFailedError("", raised(ValueError("bug"))),
        raised_from(raised(ValueError("bug"))),
        WorkerGroupStartupFailedError(f"{STARTS}{TRACEBACK}ValueError: bug"),
        ActorDiedError(of_task(ValueError("bug"))),
        actor_died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"),
        Preempted("bug"),
        ValueError(f"the node has died\n{TRACEBACK}bug"),
    ],
)
def test_paths_and_source_lines_tell_of_no_node(error: Exception) -> None:
    assert not node_gone(error)


def test_what_ray_puts_around_an_error_comes_off() -> None:
    bug = ValueError("bug")
    assert unwrapped(WorkerHealthCheckFailedError("", raised(bug))) is bug
    assert unwrapped(bug) is bug


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (raised(OSError(28, "No space left on device")), "output: '/runs/x': the disk is full; free some space"),
        (raised(OSError(122, "Disk quota exceeded")), "output: '/runs/x': the disk is full; free some space"),
        (
            RayTaskError(
                "map",
                "OSError: [Errno 28] Error writing bytes to file",
                UserCodeException("UDF failed"),
                pid=1,
                ip="10.0.0.7",
            ),
            "output: '/runs/x': the disk is full; free some space",
        ),
        (raised(OutOfDiskError("no room to spill")), "RAY_TMPDIR: the disk that Ray keeps its files on is full"),
    ],
)
def test_a_full_disk_under_ray_is_one_line(error: Exception, line: str) -> None:
    with pytest.raises(RunDirError) as caught, reporting_full_disk_of_a_task(Path("/runs/x")):
        raise error
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "error", [raised(OSError(13, "Permission denied")), raised(ValueError("28")), OSError(28, "not Ray's")]
)
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reporting_full_disk_of_a_task(Path("/runs/x")):
        raise error
    assert caught.value is error


def test_no_card_is_blamed_for_a_full_disk_or_a_mistake_in_code() -> None:
    """Before: a training that failed twice with such an error put its card aside."""
    others = [
        OSError(28, "No space left on device"),
        OSError("[Errno 28] No space left on device"),
        RuntimeError("a task failed: Disk quota exceeded"),
        OutOfDiskError("no room to spill"),
        TypeError("bug"),
        KeyError("bug"),
    ]
    assert not any(may_be_of_the_card([unwrapped(of_task(error))]) for error in others)
    mine = [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        actor_died("it was killed"),
        OSError(5, "Input/output error"),
        ConnectionResetError(104, "Connection reset by peer"),
    ]
    assert all(may_be_of_the_card([error]) for error in mine)
    assert may_be_of_the_card([])  # its worker ended without a result
