"""What Ray Train's controller tells the run.

The controller is a process of its own that imports whatever this module does. Nothing here needs torch, which saves
seconds at the start of every training.
"""

from __future__ import annotations

import uuid
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import get_current_placement_group

from moedisco_ray.core.events import Event
from moedisco_ray.execution.ray.ray_internals import ControllerCallback, WorkerGroupCallback


class Slots(WorkerGroupCallback, ControllerCallback):
    """Tells the meter from when until when a trainer's workers hold their slots, and the driver whom to end.

    Ray Train's public callbacks know neither; waiting for the slots must not be charged.

    Args:
        stage: Of the training.
        unit: Of the training.
        pool: What the meter calls the machines.
        mailbox: Of the run; see `on_ray.relay`.
        attempt: By what the mailbox knows this attempt at the training.
    """

    def __init__(self, stage: str, unit: str, pool: str, mailbox: ActorHandle, attempt: str) -> None:
        self._stage = stage
        self._unit = unit
        self._pool = pool
        self._mailbox = mailbox
        self._attempt = attempt
        self._hold: str | None = None

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002 - Ray's signature
        """This process is the controller; its end is the end of everything that it started."""
        ray.get(self._mailbox.control.remote(self._unit, self._attempt, ray.get_runtime_context().current_actor))

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """The actors are up: their nodes are known, and their placement group can be told to whoever may have to remove it.

        Before Ray Train sets torch up on them: of a worker that dies meanwhile, it leaves the group behind.
        """
        self._hold = uuid.uuid4().hex[:12]
        self._push("workers_held", {"pool": self._pool, "workers": len(workers)})
        group = ray.get(workers[0].execute_async(get_current_placement_group))
        nodes = tuple(worker.metadata.node_id for worker in workers)
        ray.get(self._mailbox.place.remote(self._unit, self._attempt, group, nodes))
        return {}

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002 - Ray's signature
        """The slots are free."""
        self._release()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:  # noqa: ARG002 - Ray's signature
        """The slots are free."""
        self._release()

    def _release(self) -> None:
        if self._hold is not None:
            self._push("workers_released", {})
            self._hold = None

    def _push(self, kind: Literal["workers_held", "workers_released"], data: dict[str, Any]) -> None:
        event = Event(kind, self._stage, data={"hold": self._hold, "unit": self._unit, **data})
        ray.get(self._mailbox.push.remote(event))


def last_line(error: BaseException) -> str:
    """The end of an error's text, where Ray puts what matters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
