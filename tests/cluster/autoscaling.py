"""Ray's own autoscaler, turn by turn, against a cloud on loopback: no raylet, no ssh."""

from __future__ import annotations

from unittest.mock import Mock

from ray.autoscaler.v2 import autoscaler
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers.cloud_instance_updater import CloudInstanceUpdater
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler
from ray.core.generated.autoscaler_pb2 import (
    ClusterResourceState,
    GangResourceRequest,
    NodeState,
    NodeStatus,
    ResourceRequest,
    ResourceRequestByCount,
)


class Turns:
    """The parts that Ray's monitor wires together, over one node provider whose head runs already.

    Args:
        config: Bootstrapped.
        provider: A node provider of it.
        head: Instance id of the head.
    """

    def __init__(self, config, provider, head):
        self._config = AutoscalingConfig(config, skip_content_hash=True)
        self._head = head
        self._version = 0
        reader = Mock(get_cached_autoscaling_config=lambda: self._config)
        self._adapter = NodeProviderAdapter(v1_provider=provider, config_reader=reader)
        self._record = autoscaler.CloudResourceMonitor()
        self._instances = InstanceManager(
            instance_storage=InstanceStorage(cluster_id="test", storage=InMemoryStorage()),
            instance_status_update_subscribers=[CloudInstanceUpdater(cloud_provider=self._adapter), self._record],
        )
        self._scheduler = ResourceDemandScheduler(Mock())

    def take(self, bundle, count=1, *, gang=False):
        """Let the autoscaler look at a queue that asks for `count` of a bundle, and act."""
        self._version += 1
        request = ResourceRequest(resources_bundle=bundle)
        state = ClusterResourceState(
            cluster_resource_state_version=self._version,
            node_states=[
                NodeState(
                    node_id=b"h" * 28,
                    instance_id=self._head,
                    ray_node_type_name="head",
                    status=NodeStatus.RUNNING,
                    node_state_version=1,
                    total_resources={"node:__internal_head__": 1.0},
                )
            ],
        )
        if gang:
            state.pending_gang_resource_requests.append(GangResourceRequest(requests=[request] * count))
        else:
            state.pending_resource_requests.append(ResourceRequestByCount(request=request, count=count))
        Reconciler.reconcile(
            instance_manager=self._instances,
            scheduler=self._scheduler,
            cloud_provider=self._adapter,
            cloud_resource_monitor=self._record,
            ray_cluster_resource_state=state,
            non_terminated_cloud_instances=self._adapter.get_non_terminated(),
            cloud_provider_errors=self._adapter.poll_errors(),
            ray_install_errors=[],
            ray_stop_errors=[],
            autoscaling_config=self._config,
            metrics_reporter=Mock(),
        )
