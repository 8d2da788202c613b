"""Ray's cloud launchers, extended so that the autoscaler tries the next node type when the cloud refuses one.

Ray 2.60 lowers the score of a node type whose machines were promised and never came. But if a cloud lacks spot capacity, it refuses
the request, which does not lower the score: Ray would request the same type forever. Here a refusal counts too.

A cluster file names one of them as `provider: {type: external, module: MODULE.AWS}` (or `.GCP`, `.Azure`), where MODULE is this
module. The other fields of `provider` are those of Ray's own launcher.
"""

from __future__ import annotations

from typing import Any

from moedisco_ray.execution.ray.ray_internals import CloudResourceMonitor, Instance, node_provider_class, set_cloud_resource_monitor

_PROVIDERS = {"AWS": "aws", "GCP": "gcp", "Azure": "azure"}
"""Ray's name of each cloud."""


def __getattr__(name: str) -> type:
    """The launcher of a cloud, made on first use: a head node has the libraries of one cloud only."""
    if name not in _PROVIDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (_WithRefusals, node_provider_class(_PROVIDERS[name])), {"__module__": __name__})


class _WithRefusals:
    """Mixin for a node provider: installs `RefusalMonitor` before the autoscaler creates its monitor."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        set_cloud_resource_monitor(RefusalMonitor)
        super().__init__(provider_config, cluster_name)  # type: ignore[call-arg]  # the node provider is the next base class


class RefusalMonitor(CloudResourceMonitor):
    """Lowers the score of a refused node type, which then recovers over ten minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._requested: dict[str, str] = {}

    def notify(self, events: list[Any]) -> None:
        """Update the scores from changes of requested instances."""
        super().notify(events)
        for event in events:
            if event.new_instance_status == Instance.QUEUED:
                self._requested[event.instance_id] = event.instance_type
            elif event.new_instance_status == Instance.ALLOCATION_FAILED and event.instance_id in self._requested:
                # Ray's event of a refusal does not name the type.
                event.instance_type = self._requested.pop(event.instance_id)
                self.allocation_timeout(event)
            elif event.new_instance_status in (Instance.ALLOCATED, Instance.TERMINATED):
                self._requested.pop(event.instance_id, None)
