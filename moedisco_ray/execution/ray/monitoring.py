"""What a run measures on its Ray cluster: metrics for Prometheus, and idle slots, which cost money too."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from ray.exceptions import RayError
from ray.util.metrics import Gauge

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stages import OF_CLUSTERS
from moedisco_ray.execution.ray import ray_internals

_POLL_SECONDS = 2.0
"""Interval between two counts of idle slots, in seconds."""


class Gauges:
    """A listener that sets Ray metrics, which Prometheus scrapes from every node.

    The Grafana dashboard uses their names.

    Args:
        config: The run's configuration. Ray must be connected.
        earlier: Events of the run so far, whose charges count too.
    """

    def __init__(self, config: RunConfig, earlier: Iterable[Event] = ()) -> None:
        self._config = config
        self._meter = Meter()
        for event in earlier:
            self._meter.update(event)
        self._begun: set[str] = set()
        self._loss = Gauge("moedisco_loss", "Training loss, nats per token", ("run", "unit"))
        self._speed = Gauge("moedisco_tokens_per_second", "Training speed", ("run", "unit"))
        self._mfu = Gauge("moedisco_mfu", "Share of the cards' peak FLOP/s that training reaches", ("run", "unit"))
        self._dollars = Gauge("moedisco_dollars", "Spent so far, over all attempts", ("run", "pool"))
        self._waiting = Gauge("moedisco_submodels_waiting", "Sub-models that no worker has begun yet", ("run",))

    def __call__(self, event: Event) -> None:
        run = {"run": self._config.name}
        self._meter.update(event)
        spent = dict.fromkeys(self._config.pools.by_key, 0.0)
        for line in metered_bill(self._meter, self._config).lines:
            spent[line.pool] = spent.get(line.pool, 0.0) + (line.dollars or 0.0)
        for key, dollars in spent.items():
            self._dollars.set(dollars, {**run, "pool": key})
        if event.unit is not None and event.type == "progress":
            unit = {**run, "unit": event.unit}
            self._loss.set(event.data["loss"], unit)
            self._speed.set(event.data["tokens_per_second"], unit)
            if event.data.get("mfu") is not None:
                self._mfu.set(event.data["mfu"], unit)
        if event.stage in OF_CLUSTERS:
            if event.unit is not None:
                self._begun.add(event.unit)
            ended = event.type in ("stage_finished", "stage_skipped")
            self._waiting.set(0 if ended else self._config.cluster_count - len(self._begun), run)


@contextlib.contextmanager
def reporting_idle_slots(
    config: RunConfig, emit: Emit, idle_seats: Callable[[str], int], interval: float = _POLL_SECONDS
) -> Iterator[None]:
    """Emit a `slots_free` event inside the block whenever a pool's number of idle slots changes.

    Errors of Ray and those of a full disk are ignored: the next poll tries again.

    Args:
        config: Names the pools. If two pools share a tag, its slots count for the first of them.
        emit: Receives the events.
        idle_seats: Function of a tag; returns the number of slots with this tag that idle seats of the run hold.
        interval: Seconds between two polls.
    """
    pools = {pool.resource: key for key, pool in reversed(config.pools.by_key.items())}
    stopped = threading.Event()
    reported: dict[str, int] = {}

    def report() -> None:
        nodes = list(ray_internals.available_resources_per_node().values())
        for resource, key in pools.items():
            slots = idle_slots(nodes, resource) + idle_seats(resource)
            if slots != reported.get(key, 0):
                emit(Event("slots_free", data={"pool": key, "slots": slots}))
                reported[key] = slots

    def poll() -> None:
        last = False
        while not last:
            with contextlib.suppress(OSError, RayError):
                report()
            last = stopped.wait(interval)

    thread = threading.Thread(target=poll, name="idle-slots", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def idle_slots(nodes: Iterable[Mapping[str, float]], resource: str) -> int:
    """Number of slots that no worker holds.

    A slot that a placement group keeps for a later worker is idle, although Ray counts it as used.

    Args:
        nodes: Free resources of each node, by name of the resource. For a placement group, Ray adds a resource
            RESOURCE_group_ID, and RESOURCE_group_N_ID for each bundle.
        resource: The pool's tag.
    """
    names = re.compile(rf"{re.escape(resource)}(_group_[0-9a-f]+)?")
    return round(sum(amount for available in nodes for name, amount in available.items() if names.fullmatch(name)))
