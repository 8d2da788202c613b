"""Trainings on the connected cluster: as many at once as the pool has room for, until they have all ended, or enough of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.events import Emit
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.attempts import AttemptContext
from moedisco_ray.execution.ray.event_mailbox import relay
from moedisco_ray.execution.ray.queue import Queue
from moedisco_ray.execution.submodel_progress import SubmodelProgress
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.training import TrainJob

Watch = Callable[[Sequence[float], Sequence[float], int, float], None]


def train_all(
    jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = NEVER, quorum: Quorum = ALL,
    run: str = "run", watch: Watch | None = None,
) -> list[Trained]:
    """Train every job; those that wait, or whose machine was taken away, hold nothing.

    Args:
        jobs: Results come in their order.
        placement: Where.
        directory: For Ray Train's own state, the flag that stops the trainers, and what is known of the jobs; all nodes must
            see it.
        emit: Receives the workers' events.
        stop: Asks the trainers to end.
        quorum: How many of the jobs must be finished, and for how long the others are waited for.
        run: Begins the names of the Ray Train runs.
        watch: Is told, at every look, the seconds of work left of what runs and of what waits, the slots that there are, and what
            losses and checkpoints add to the seconds, as a factor.

    Raises:
        MoeDiscoError: The first job's error that is ours, such as a full disk.
        OSError: An event could not be written.
        PoolError: A job fits no node type of a mixed pool.
        TrainingError: A worker died more often than allowed, or a training is poisoned, and the quorum is out of reach.
        RunStopped: Somebody asked the run to end; the trainers have saved a checkpoint and ended.
        KeyboardInterrupt: The same, from the keyboard.
    """
    directory.mkdir(parents=True, exist_ok=True)
    end = StopFile(directory / f"stop-{uuid.uuid4().hex}")
    submodel_progress = SubmodelProgress(jobs, quorum, placement.workers, directory / "submodel_progress.json")
    with relay(emit) as mail, ThreadPoolExecutor(len(jobs) + 1, thread_name_prefix="trainer") as threads:
        queue = Queue(jobs, AttemptContext(run, placement, directory, (stop, end), mail), threads, submodel_progress)
        try:
            while queue.worth_waiting:
                stop.check()
                mail.check()
                queue.start()
                if watch is not None:
                    watch(*queue.left, session.room(placement.pool, placement.workers), queue.stretch)
                queue.settle()
            end.request("enough")
            queue.let_go()
        finally:
            # Whatever ends the queue ends its trainers, each with a checkpoint, before the executor waits for them.
            end.request("ended")
            queue.await_ends()
        return queue.results
