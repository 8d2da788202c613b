"""kuberay.yaml against the operator's own definitions, where they are at hand, and against what they do not say."""

from __future__ import annotations

import os
from pathlib import Path

import jsonschema
import pytest
import yaml
from cluster_files import kubernetes_objects
from ray._private.label_utils import validate_node_label_syntax

CRDS = os.environ.get("MOEDISCO_TEST_KUBERAY_CRDS")
"""A folder with the operator's `ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml`."""


def of_kind(kind):
    found, = [each for each in kubernetes_objects() if each["kind"] == kind]
    return found


@pytest.fixture
def cluster():
    return of_kind("RayCluster")["spec"]


def pods(cluster):
    return [cluster["headGroupSpec"]["template"]["spec"], *(group["template"]["spec"] for group in cluster["workerGroupSpecs"])]


def strict(schema):
    """The schema, with keys that it does not name refused, as the API server refuses or drops them."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if closed.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    open_ended = closed.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in closed
    if isinstance(closed.get("properties"), dict) and not open_ended:
        closed["additionalProperties"] = False
    return closed


@pytest.mark.skipif(CRDS is None, reason="MOEDISCO_TEST_KUBERAY_CRDS names no folder")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_operator_accepts_it(kind):
    definition = yaml.safe_load((Path(CRDS) / f"ray.io_{kind.lower()}s.yaml").read_text())
    version, = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(of_kind(kind), schema)


def test_groups_start_empty_and_name_one_tag_for_each_gpu(cluster):
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        tag, = [name for name in group["resources"] if name.endswith("_mem_gpu")]
        limits = [container["resources"]["limits"] for container in group["template"]["spec"]["containers"]]
        assert int(group["resources"][tag]) == int(group["resources"]["GPU"]) == sum(each["nvidia.com/gpu"] for each in limits)
        validate_node_label_syntax(group["labels"])


def test_each_pool_falls_back_from_spot_to_on_demand(cluster):
    for tier in ("low_memory", "high_memory"):
        groups = [group for group in cluster["workerGroupSpecs"] if group["labels"]["moedisco/pool"] == tier]
        priorities = {group["labels"]["moedisco/market"]: group["priority"] for group in groups}
        assert priorities["spot"] > priorities["on-demand"]
        assert len({tuple(group["resources"].items()) for group in groups}) == 1
        for group in groups:
            selects_spot = "cloud.google.com/gke-spot" in group["template"]["spec"]["nodeSelector"]
            assert selects_spot == (group["labels"]["moedisco/market"] == "spot")


def test_nothing_runs_as_root_or_with_a_right_it_does_not_need(cluster):
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["serviceAccountName"] == "moedisco"
        for container in pod["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["limits"] == container["resources"]["requests"] or container["name"] == "service"
    assert of_kind("ServiceAccount")["automountServiceAccountToken"] is False


def test_only_the_cluster_itself_and_the_operator_reach_it(cluster):
    policy = of_kind("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    peers = [peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]]
    assert peers == [{"ray.io/cluster": "moedisco"}, {"app.kubernetes.io/name": "kuberay-operator"}]
    assert cluster["authOptions"] == {"mode": "token"}


def test_what_the_service_remembers_outlives_the_head_and_every_node_sees_the_runs(cluster):
    objects = [each for each in kubernetes_objects() if each["kind"] == "PersistentVolumeClaim"]
    claims = {each["metadata"]["name"]: each["spec"]["accessModes"] for each in objects}
    assert claims == {"moedisco-state": ["ReadWriteOnce"], "moedisco-runs": ["ReadWriteMany"]}
    for pod in pods(cluster):
        assert {"name": "runs", "persistentVolumeClaim": {"claimName": "moedisco-runs"}} in pod["volumes"]
        assert any(mount["mountPath"] == "/moedisco/runs" for mount in pod["containers"][0]["volumeMounts"])
