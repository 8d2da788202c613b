"""Tells how many slots of each pool are there and free, whenever that changes: machines that nobody uses are paid for too."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping

from ray.exceptions import RayError

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.execution.ray import ray_internals

_INTERVAL = 2.0
"""Seconds between two looks."""


@contextlib.contextmanager
def free_slots(config: RunConfig, emit: Emit, interval: float = _INTERVAL) -> Iterator[None]:
    """Emit `slots_free` events inside the block. A look that fails, at Ray or for a full disk, is made again.

    Args:
        config: Names the pools. Of two with one tag, the first is charged.
        emit: Takes the events.
        interval: Seconds between two looks.
    """
    pools = {pool.resource: key for key, pool in reversed(config.pools.by_key.items())}
    stopped = threading.Event()

    told: dict[str, int] = {}

    def look() -> None:
        nodes = list(ray_internals.available_resources_per_node().values())
        for resource, key in pools.items():
            slots = unused(nodes, resource)
            if slots != told.get(key, 0):
                emit(Event("slots_free", data={"pool": key, "slots": slots}))
                told[key] = slots

    def keep_looking() -> None:
        last = False
        while not last:
            with contextlib.suppress(OSError, RayError):
                look()
            last = stopped.wait(interval)

    thread = threading.Thread(target=keep_looking, name="free-slots", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def unused(nodes: Iterable[Mapping[str, float]], resource: str) -> int:
    """Slots that no worker holds; one that a placement group keeps for a worker to come is unused, though Ray calls it taken.

    Args:
        nodes: What is available on each, by name. A group's is RESOURCE_group_ID, beside one RESOURCE_group_N_ID per bundle.
        resource: The pool's tag.
    """
    ours = re.compile(rf"{re.escape(resource)}(_group_[0-9a-f]+)?")
    return round(sum(amount for there in nodes for name, amount in there.items() if ours.fullmatch(name)))
