"""Ray's launchers of machines in a cloud, which give way to the next node type when the cloud refuses one.

Ray 2.60 lowers the standing of a node type whose machines were promised and never came, but asks on and on for one that is refused
at once, as spot machines are where there is no capacity: its record of what can be had does not hear of refusals. Here it does.

A cluster file names one by `provider: {type: external, module: ...}`, with this module's name and `.AWS`, `.GCP` or
`Azure`; the rest of `provider` is that of Ray's own.
"""

from __future__ import annotations

import importlib
from typing import Any

from ray.autoscaler.v2 import autoscaler
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.instance_manager_pb2 import Instance

_LAUNCHERS = {
    "AWS": ("aws", "AWSNodeProvider"),
    "GCP": ("gcp", "GCPNodeProvider"),
    "Azure": ("_azure", "AzureNodeProvider"),
}


def __getattr__(name: str) -> type:
    """The launcher of a cloud; its libraries are imported only now, for a head has those of one."""
    if name not in _LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, kind = _LAUNCHERS[name]
    base = getattr(importlib.import_module(f"ray.autoscaler._private.{package}.node_provider"), kind)
    return type(name, (_GivesWay, base), {"__module__": __name__})


class _GivesWay:
    """Goes before a node provider, which an autoscaler makes before its record of what can be had."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        autoscaler.CloudResourceMonitor = HearsRefusals
        super().__init__(provider_config, cluster_name)  # type: ignore[call-arg]  # the node provider that follows


class HearsRefusals(CloudResourceMonitor):
    """Counts a refusal as Ray counts a promise that was not kept: the type comes back by degrees, over ten minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._asked_for: dict[str, str] = {}

    def notify(self, events: list[Any]) -> None:
        """Take note of what became of instances that were asked for."""
        super().notify(events)
        for event in events:
            if event.new_instance_status == Instance.QUEUED:
                self._asked_for[event.instance_id] = event.instance_type
            elif event.new_instance_status == Instance.ALLOCATION_FAILED and event.instance_id in self._asked_for:
                # Ray's event of a refusal does not name the type.
                event.instance_type = self._asked_for.pop(event.instance_id)
                self.allocation_timeout(event)
            elif event.new_instance_status in (Instance.ALLOCATED, Instance.TERMINATED):
                self._asked_for.pop(event.instance_id, None)
