"""Ray's cloud launchers, extended so that the autoscaler tries the next node type when the cloud has no machine of one.

Ray 2.60 lowers the score of a node type whose machines were promised and never came. But if a cloud lacks spot
capacity, it refuses the request, and a refusal does not lower the score: Ray would request the same type forever. Here
a refusal for lack of capacity lowers the score too. Other refusals, such as for a missing permission or a wrong image,
do not: otherwise Ray would fall back to on-demand machines, which cost a multiple. These refusals are logged, and
published for the runs that wait.

A cluster file names one of the launchers as `provider: {type: external, module: MODULE.LAUNCHER}`, where MODULE is this
module and LAUNCHER that of a page of `execution.clouds`, such as `AWS`. The other fields of `provider` are those of
Ray's own launcher.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from moedisco_ray.execution.clouds import CLOUDS
from moedisco_ray.execution.ray.autoscaling import launch_failures
from moedisco_ray.execution.ray.ray_internals import (
    NODE_KIND_WORKER,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_USER_NODE_TYPE,
    CloudResourceMonitor,
    Instance,
    NodeLaunchException,
    node_provider_class,
    set_cloud_resource_monitor,
)

logger = logging.getLogger(__name__)

_LAUNCHERS = {cloud.launcher: cloud for cloud in CLOUDS.values()}
_LOG_SECONDS = 300.0
"""Interval at which the log repeats that a node type fails to start, in seconds; the autoscaler tries it every few
seconds."""
_MAX_ERRORS = 1000
"""Number of the newest errors that are kept until the autoscaler handles them."""

Errors = dict[tuple[str, str], str]
"""The text of each failed request's error, by launch request and node type."""


def __getattr__(name: str) -> type:
    """The launcher of a cloud, made on first use: a head node has the libraries of one cloud only."""
    if name not in _LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cloud = _LAUNCHERS[name]
    special = {_ZoneByZone: cloud.zone_by_zone, _WorkerIdentity: cloud.worker_identity}
    extensions = [each for each, is_needed in special.items() if is_needed]
    return type(name, (_WithErrors, *extensions, node_provider_class(cloud.name)), {"__module__": __name__})


class _WithErrors:
    """Mixin for a node provider: installs a `RefusalMonitor`, and keeps for it the cloud's errors, which Ray drops."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        self._errors: Errors = {}
        set_cloud_resource_monitor(functools.partial(RefusalMonitor, self._errors))
        # The node provider is the next base class.
        super().__init__(provider_config, cluster_name)  # type: ignore[call-arg]

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> Any:
        """See Ray's `NodeProvider`."""
        try:
            return super().create_node_with_resources_and_labels(  # type: ignore[misc]
                node_config, tags, count, resources, labels
            )
        except Exception as error:
            self._errors[tags.get(TAG_RAY_LAUNCH_REQUEST, ""), tags[TAG_RAY_USER_NODE_TYPE]] = str(error)
            for oldest in list(self._errors)[:-_MAX_ERRORS]:
                self._errors.pop(oldest, None)
            raise


class _ZoneByZone:
    """Mixin for AWS: requests nodes from one zone at a time, and keeps the nodes of the high-memory pool in one zone.

    Ray's own launcher reports only the error of the last zone, which may not offer the machine at all while another
    zone only lacks capacity. It may also spread the nodes of a gang over several zones, and AWS bills the traffic
    between zones.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)  # type: ignore[call-arg]
        self._one_gang = threading.Lock()

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        _resources: dict[str, float],
        labels: dict[str, str],
    ) -> Any:
        """See Ray's `NodeProvider`."""
        pool = labels.get("moedisco/pool")
        if pool != "high_memory":
            return self._start(node_config["SubnetIds"], node_config, tags, count)
        marked = {"moedisco-pool": pool}
        with self._one_gang:  # the launcher starts large gangs in several calls at once
            present = self.non_terminated_nodes(marked)  # type: ignore[attr-defined]
            subnets = node_config["SubnetIds"]
            if present:
                subnets = [self._get_cached_node(present[0]).subnet_id]  # type: ignore[attr-defined]
            return self._start(subnets, node_config, tags | marked, count)

    def _start(self, subnets: list[str], node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
        errors = []
        for subnet in subnets:
            settings = node_config | {"SubnetIds": [subnet]}
            try:
                return self.create_node(settings, tags, count)  # type: ignore[attr-defined]
            except NodeLaunchException as error:
                errors.append(error)
        raise next((error for error in errors if launch_failures.kind_of(str(error)) == "capacity"), errors[0])


class _WorkerIdentity:
    """Mixin for Azure: workers get an identity of their own, `worker_msi_name` of the cluster file.

    Ray's own launcher gives the head's identity to all machines. It may start, change and delete machines, and
    code that runs on a worker could use it.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
        """See Ray's `NodeProvider`."""
        if tags[TAG_RAY_NODE_KIND] == NODE_KIND_WORKER:  # only the head's autoscaler starts workers, and nothing else
            settings: dict[str, Any] = self.provider_config  # type: ignore[has-type]  # the node provider's
            identities = settings["msi"].rpartition("/")[0]
            self.provider_config = settings | {"msi": f"{identities}/{settings['worker_msi_name']}"}
        return super().create_node(node_config, tags, count)  # type: ignore[misc]


class RefusalMonitor(CloudResourceMonitor):
    """Lowers the score of a node type that the cloud lacks, and reports other failures.

    The score recovers over ten minutes.

    Args:
        errors: Where the node provider stores errors.
    """

    def __init__(self, errors: Errors, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._errors = errors
        self._clock = clock
        self._requested: dict[str, tuple[str, str]] = {}
        self._failing: dict[str, str] = {}
        self._logged: dict[str, float] = {}

    def notify(self, events: list[Any]) -> None:
        """Update the scores from changes of requested instances."""
        super().notify(events)
        for event in events:
            status, is_requested = event.new_instance_status, event.instance_id in self._requested
            if status == Instance.REQUESTED:
                self._requested[event.instance_id] = event.launch_request_id, event.instance_type
            elif status == Instance.ALLOCATION_FAILED and is_requested:
                self._failed(event, self._requested.pop(event.instance_id))
            elif status in (Instance.ALLOCATED, Instance.TERMINATED) and is_requested:
                _, node_type = self._requested.pop(event.instance_id)
                self._forget(node_type)

    def _failed(self, event: Any, request: tuple[str, str]) -> None:
        node_type = request[1]
        error = self._errors.get(request)
        if error is None or launch_failures.kind_of(error) == "capacity":
            self._forget(node_type)
            # Ray's event of a failure does not name the type.
            event.instance_type = node_type
            self.allocation_timeout(event)
            return
        self._failing[node_type] = launch_failures.message(node_type, error)
        launch_failures.publish(self._failing)
        if self._clock() - self._logged.get(node_type, -_LOG_SECONDS) >= _LOG_SECONDS:
            self._logged[node_type] = self._clock()
            logger.warning("%s", self._failing[node_type])

    def _forget(self, node_type: str) -> None:
        if self._failing.pop(node_type, None) is not None:
            self._logged.pop(node_type)
            launch_failures.publish(self._failing)
