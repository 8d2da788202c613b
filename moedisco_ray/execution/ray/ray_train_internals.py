"""All private API of Ray Train that the package uses, checked with the Ray version `ray_internals.CHECKED_WITH`."""

# If this file exists, Ray Train restores an earlier run of the same name. No public function deletes the file.
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

# The public errors of Ray Train carry these as causes; without them, missing slots look like a failed worker.
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

# The public `ray.train.UserCallback` does not hear when the controller starts, nor when workers take and free their
# slots.
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

__all__ = [
    "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME",
    "ControllerCallback",
    "InsufficientClusterResourcesError",
    "WorkerGroupCallback",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
]
