"""A run's figures as Ray metrics, which Prometheus scrapes from every node and the Grafana dashboard draws."""

from __future__ import annotations

from ray.util.metrics import Gauge

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.events import Event
from moedisco_ray.core.metering import Meter


class Gauges:
    """A listener, made inside a Ray session; the metrics' names are those that the Grafana dashboard asks for."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._meter = Meter()
        self._begun: set[str] = set()
        self._loss = Gauge("moedisco_loss", "Training loss, nats per token", ("run", "unit"))
        self._speed = Gauge("moedisco_tokens_per_second", "Training speed", ("run", "unit"))
        self._dollars = Gauge("moedisco_dollars", "Spent since the driver began, at the configuration's prices", ("run", "pool"))
        self._waiting = Gauge("moedisco_submodels_waiting", "Sub-models that no worker has begun yet", ("run",))

    def __call__(self, event: Event) -> None:
        """Take an event."""
        run = {"run": self._config.name}
        self._meter.update(event)
        for key, pool in self._config.pools.by_key.items():
            dollars = self._meter.worker_seconds.get(key, 0.0) / 3600 * pool.price_per_hour
            self._dollars.set(dollars, {**run, "pool": key})
        if event.unit is not None and event.type == "progress":
            unit = {**run, "unit": event.unit}
            self._loss.set(event.data["loss"], unit)
            self._speed.set(event.data["tokens_per_second"], unit)
        if event.stage == "submodels":
            if event.unit is not None:
                self._begun.add(event.unit)
            ended = event.type in ("stage_finished", "stage_skipped")
            self._waiting.set(0 if ended else self._config.clusters.count - len(self._begun), run)
