"""The reports of a gang to Ray Train: metrics, and references to checkpoints.

Ray Train need not copy a checkpoint, because the workers have written it below the directory of the Ray Train run.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.store.locations import Location, joined, parent
from moedisco_ray.core.store.remote import resolve
from moedisco_ray.execution.ray.ray_train_internals import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.checkpoints.storage import folder_name
from moedisco_ray.training.consensus import from_rank_zero

_REPORT_SECONDS = 10.0
"""Minimum seconds between two reports: Ray Train accepts one every 2 s, and a worker blocks until its last one is
accepted."""


def ray_train_run(job: TrainJob) -> tuple[Location, str]:
    """Storage path and name of a gang's Ray Train run; the run's directory contains the job's checkpoints."""
    return parent(parent(job.checkpoints)[0])


def forget_earlier_run(storage_path: Location, name: str) -> None:
    """Delete Ray Train's list of an earlier attempt's checkpoints.

    Ray Train does not start if a listed one is missing.

    The workers do not need the list: they resume from the newest checkpoint with valid checksums.

    Raises:
        OSError: The storage cannot be reached.
    """
    system, path = resolve(joined(storage_path, name, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))
    with contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


class TrainReports:
    """Reports a worker's newest metrics and newest checkpoint to Ray Train.

    All workers of a gang must report equally often.

    Args:
        job: The training.
        world: Rank of this process, and number of processes.
    """

    def __init__(self, job: TrainJob, world: World) -> None:
        self._folder = parent(job.checkpoints)[1]
        self._world = world
        self._sent_at = time.monotonic()
        self._metrics: dict[str, Any] = {}
        self._step: int | None = None

    def noting(self, emit: Emit) -> Emit:
        """An `emit` that also keeps the newest metrics and checkpoint for the next report."""

        def noted(event: Event) -> None:
            if event.type == "progress":
                self._metrics = dict(event.data)
            elif event.type == "checkpoint":
                self._step = event.data["step"]
            emit(event)

        return noted

    def send_if_due(self) -> None:
        """Report if rank 0 has new metrics and made its last report at least `_REPORT_SECONDS` ago."""
        if from_rank_zero(self._is_due, self._world):
            self.send()

    def _is_due(self) -> bool:
        return bool(self._metrics) and time.monotonic() - self._sent_at >= _REPORT_SECONDS

    def send(self) -> None:
        """Report the newest metrics, and the newest checkpoint if one was saved since the last report."""
        storage = ray.train.get_context().get_storage()
        step, self._step = self._step, None
        checkpoint = (
            None
            if step is None
            else Checkpoint(
                storage.build_checkpoint_path_from_name(f"{self._folder}/{folder_name(step)}"),
                storage.storage_filesystem,
            )
        )
        self._sent_at = time.monotonic()
        ray.train.report(self._metrics, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
