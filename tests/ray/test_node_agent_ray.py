"""A real cluster of two nodes: the agent hears a stand-in's notice, and its own node becomes draining."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import ray
from metadata_standin import AwsStandin, serving
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from waiting import until

from moedisco_ray.execution.ray.autoscaling.draining import drain

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


@ray.remote(num_cpus=1)
class Busy:
    """Holds its node: an idle one ends as soon as it is drained."""

    def ping(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_a_notice_on_the_metadata_service_drains_the_node(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    busy = Busy.remote()
    assert ray.get(busy.ping.remote()) == node.node_id
    gcs = GcsClient(address=cluster.address)
    standin = AwsStandin()
    with serving(standin):
        agent = subprocess.Popen(
            [
                sys.executable,
                "-u",
                "-c",
                "from service.commands.node_agent import commands; commands()",
                "--provider",
                "auto",
                "--metadata-url",
                standin.url,
                "--interval",
                "0.2",
                "--node-id",
                node.node_id,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            until(lambda: any(path.endswith("instance-action") for _, path in standin.asked))
            assert not gcs.get_draining_nodes()
            standin.expire()
            standin.interrupt(action="terminate", time="2033-05-18T03:33:20Z")
            draining = until(gcs.get_draining_nodes)
            assert {str(key.hex() if hasattr(key, "hex") else key): at for key, at in draining.items()} == {
                node.node_id: 2_000_000_000_000
            }
            # The actor on the node continues until the cloud takes it; no new work comes.
            assert ray.get(busy.ping.remote()) == node.node_id
            # A second drain changes nothing, and the head was left alone.
            assert drain(cluster.address, node.node_id, 2_000_000_000_000, "again") is False
        finally:
            agent.send_signal(signal.SIGTERM)
            said, _ = agent.communicate(timeout=30)
    assert agent.returncode == 0
    assert f"drained Ray node {node.node_id}" in said


def test_a_node_that_the_cluster_does_not_know_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="has no node"):
        drain(cluster.address, "11" * 28, 2_000_000_000_000, "unknown")
