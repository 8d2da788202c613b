"""What Ray Train's controller reports to the run, and what it asks of the workers before they form a gang.

The controller is a process of its own that imports whatever this module imports. Nothing here needs torch, which saves
seconds at the start of every training.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import get_current_placement_group

from moedisco_ray.core.errors import CardError, raise_together
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.cards import CHECK_SECONDS, hanging_card
from moedisco_ray.execution.ray.interfaces import name_interface
from moedisco_ray.execution.ray.ray_train_internals import ControllerCallback, WorkerGroupCallback


@dataclasses.dataclass(frozen=True)
class CardCheck:
    """The check of each worker's GPU.

    Attributes:
        field: Setting that asks for the GPU.
        gpus: Number of GPUs that it asks for.
        function: A reference to a function that raises a `CardError` on a worker whose GPU torch cannot use. A worker
            unpacks the function, which imports torch.
        seconds: Time that the check may take (s).
    """

    field: str
    gpus: int
    function: ray.ObjectRef
    seconds: float = CHECK_SECONDS


class SlotReporter(WorkerGroupCallback, ControllerCallback):
    """Reports when a trainer's workers take and free their slots, so that waiting for slots is not charged.

    Before the workers form a gang, they name their network interface and check their GPUs.

    Args:
        stage: Stage of the training.
        unit: Name of the training.
        pool: Key of the pool in the meter.
        mailbox: The run's mailbox actor; see `event_mailbox`.
        attempt: Id of this attempt in the mailbox.
        dumps: Pickles an outcome for the driver.
        check: The check of each worker's GPU; None if the workers have no GPUs.
    """

    def __init__(
        self,
        *,
        stage: str,
        unit: str,
        pool: str,
        mailbox: ActorHandle,
        attempt: str,
        dumps: Callable[[Any], bytes],
        check: CardCheck | None = None,
    ) -> None:
        self._check = check
        self._stage = stage
        self._unit = unit
        self._pool = pool
        self._mailbox = mailbox
        self._attempt = attempt
        self._dumps = dumps
        self._hold: str | None = None

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002 - Ray's signature
        """Register the controller, which is this process: killing it ends everything that it started."""
        ray.get(self._mailbox.set_actor.remote(self._unit, self._attempt, ray.get_runtime_context().current_actor))

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Report that the workers are up, with their nodes and placement group.

        This precedes torch's setup on the workers: if one dies during it, Ray Train does not remove the placement
        group. A GPU that torch cannot use would make that setup fail, with words that name neither node nor cause.

        Raises:
            CardError: torch cannot use the GPU of a worker, or its check does not end. The mailbox has the same error
                as the attempt's outcome.
        """
        self._hold = uuid.uuid4().hex[:12]
        self._push("workers_held", {"pool": self._pool, "workers": len(workers)})
        group = ray.get(workers[0].execute_async(get_current_placement_group))
        nodes = tuple(worker.metadata.node_id for worker in workers)
        ray.get(self._mailbox.set_workers.remote(self._unit, self._attempt, nodes, group))
        ray.get([worker.execute_async(name_interface) for worker in workers])
        if self._check is not None:
            self._raise_failed(workers, self._check)
        return {}

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002 - Ray's signature
        """Report that the slots are free."""
        self._release()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:  # noqa: ARG002 - Ray's signature
        """Report that the slots are free."""
        self._release()

    def _raise_failed(self, workers: list[Any], check: CardCheck) -> None:
        node_ids = {worker.execute_async(_failure, [check.function]): worker.metadata.node_id for worker in workers}
        ended, hanging = ray.wait(list(node_ids), num_returns=len(node_ids), timeout=check.seconds)
        failed = [error for error in ray.get(ended) if error is not None]
        failed += [hanging_card(check.field, check.gpus, node_ids[each], check.seconds) for each in hanging]
        try:
            raise_together(failed)
        except CardError as error:
            ray.get(self._mailbox.set_outcome.remote(self._unit, self._attempt, self._dumps(error)))
            raise

    def _release(self) -> None:
        if self._hold is not None:
            self._push("workers_released", {})
            self._hold = None

    def _push(self, kind: Literal["workers_held", "workers_released"], data: dict[str, Any]) -> None:
        event = Event(kind, self._stage, data={"hold": self._hold, "unit": self._unit, **data})
        ray.get(self._mailbox.push.remote(event))


def _failure(check: list[ray.ObjectRef]) -> CardError | None:
    """The error that a worker's check raises, if it does. Ray would fetch a reference that is not in a list."""
    try:
        ray.get(check[0])()
    except CardError as error:
        return error
    return None
