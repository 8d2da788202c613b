"""The KubeRay files against schemas of ours, and these against the operator's, where they are at hand."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from cluster_files import FOLDER, kubernetes_objects
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.kuberay import node_provider

SCHEMAS = yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text())
CRDS = os.environ.get("MOEDISCO_TEST_KUBERAY_CRDS")
"""A folder with the operator's `ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml`."""


def of_kind(kind):
    (found,) = [each for each in kubernetes_objects() if each["kind"] == kind]
    return found


@pytest.fixture
def cluster():
    return of_kind("RayCluster")["spec"]


def pods(cluster):
    """Specifications of the head's pod and of each group's."""
    return [
        cluster["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in cluster["workerGroupSpecs"]),
    ]


def mounted_files(cluster):
    """Names of the files that the autoscaler's volume holds."""
    volumes = {volume["name"]: volume for volume in pods(cluster)[0]["volumes"]}
    sources = volumes[cluster["autoscalerOptions"]["volumeMounts"][0]["name"]]["projected"]["sources"]
    (token,) = [source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source]
    items = [item for source in sources for item in next(iter(source.values())).get("items", ())]
    return [token["path"], *(item["path"] for item in items)]


def ours(kind):
    return {"$defs": SCHEMAS["$defs"], **SCHEMAS[kind]}


def operators(kind):
    """The operator's own schema of a kind."""
    definition = yaml.load((Path(CRDS) / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


def assert_no_wider(schema, theirs, path):
    """Check that a schema of ours has only their keys, with their types, and requires all that they require."""
    if "$ref" in schema:
        schema = SCHEMAS["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in schema:
        assert theirs["x-kubernetes-int-or-string"], path
        return
    if not theirs.get("x-kubernetes-int-or-string"):
        assert schema["type"] == theirs["type"], path
    if "enum" in theirs:
        assert set(schema["enum"]) <= set(theirs["enum"]), path
    defaulted = {key for key, value in theirs.get("properties", {}).items() if "default" in value}
    assert {*theirs.get("required", ())} - defaulted <= {*schema.get("required", ())}, path
    for key, value in schema.get("properties", {}).items():
        if path or key == "spec":  # what stands beside `spec` is every object's
            assert key in theirs["properties"], f"{path}.{key}"
            assert_no_wider(value, theirs["properties"][key], f"{path}.{key}")
    for part in ("items", "additionalProperties"):
        if schema.get(part):
            assert_no_wider(schema[part], theirs[part], f"{path}[]")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_schema_accepts_it(kind):
    jsonschema.Draft202012Validator.check_schema(ours(kind))
    jsonschema.validate(of_kind(kind), ours(kind))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda spec: spec.update(autoscaling=True), "'autoscaling' was unexpected"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("minReplicas"), "'minReplicas' is a required property"),
        (lambda spec: spec["workerGroupSpecs"][0]["resources"].update(low_mem_gpu=1), "1 is not of type 'string'"),
        (lambda spec: spec["autoscalerOptions"].update(version="v3"), "'v3' is not one of"),
        (
            lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(user=1000),
            "'user' was unexpected",
        ),
        (
            lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"].update(
                memory="8 GB"
            ),
            "'8 GB' does not match",
        ),
    ],
)
def test_the_schema_refuses_what_the_operator_would_not_read(spoil, says):
    spoiled = copy.deepcopy(of_kind("RayCluster"))
    spoil(spoiled["spec"])
    with pytest.raises(jsonschema.ValidationError, match=says):
        jsonschema.validate(spoiled, ours("RayCluster"))


@pytest.mark.skipif(CRDS is None, reason="MOEDISCO_TEST_KUBERAY_CRDS names no folder")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_schema_allows_nothing_that_the_operators_own_does_not(kind):
    assert_no_wider(ours(kind), operators(kind), "")


def test_groups_start_empty_and_name_one_tag_for_each_gpu(cluster):
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        (limit,) = [container["resources"]["limits"] for container in group["template"]["spec"]["containers"]]
        validate_node_label_syntax(group["labels"])
        if group["labels"]["moedisco/pool"] == "cpu":
            assert group["resources"] == {"CPU": limit["cpu"]}
            continue
        (tag,) = [name for name in group["resources"] if name.endswith("_mem_gpu")]
        assert int(group["resources"][tag]) == int(group["resources"]["GPU"]) == limit["nvidia.com/gpu"]
        assert group["resources"]["CPU"] == "0"


def test_each_pool_falls_back_from_spot_to_on_demand(cluster):
    for tier in ("low_memory", "high_memory", "cpu"):
        groups = [group for group in cluster["workerGroupSpecs"] if group["labels"]["moedisco/pool"] == tier]
        priorities = {group["labels"]["moedisco/market"]: group["priority"] for group in groups}
        assert priorities["spot"] > priorities["on-demand"]
        assert len({tuple(group["resources"].items()) for group in groups}) == 1
        for group in groups:
            selects_spot = "cloud.google.com/gke-spot" in group["template"]["spec"]["nodeSelector"]
            assert selects_spot == (group["labels"]["moedisco/market"] == "spot")


def test_text_processing_needs_no_gpu_and_stays_off_gpu_nodes(cluster):
    groups = [
        group["template"]["spec"] for group in cluster["workerGroupSpecs"] if group["labels"]["moedisco/pool"] == "cpu"
    ]
    assert len(groups) == 2
    for pod in groups:
        assert "nvidia.com/gpu" not in str(pod)


def test_a_gang_is_in_one_zone(cluster):
    for group in cluster["workerGroupSpecs"]:
        rules = (
            group["template"]["spec"]
            .get("affinity", {})
            .get("podAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", [])
        )
        if group["labels"]["moedisco/pool"] == "high_memory":
            (rule,) = rules
            assert rule["topologyKey"] == "topology.kubernetes.io/zone"
            assert rule["labelSelector"]["matchLabels"] == group["template"]["metadata"]["labels"]
        else:
            assert not rules


def test_nothing_runs_as_root_or_with_a_right_it_does_not_need(cluster):
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["serviceAccountName"] == ("moedisco" if pod != pods(cluster)[0] else "moedisco-head")
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert (
                container["resources"]["limits"] == container["resources"]["requests"] or container["name"] == "service"
            )
    accounts = [each for each in kubernetes_objects() if each["kind"] == "ServiceAccount"]
    assert {each["metadata"]["name"]: each["automountServiceAccountToken"] for each in accounts} == {
        "moedisco": False,
        "moedisco-head": False,
    }


def test_the_autoscaler_alone_gets_a_token_for_kubernetes(cluster):
    """Before: nothing mounted one, so that no worker could ever start."""
    (mount,) = cluster["autoscalerOptions"]["volumeMounts"]
    assert mount["readOnly"]
    assert {f"{mount['mountPath']}/{name}" for name in mounted_files(cluster)} >= {
        node_provider.IN_CLUSTER_TOKEN_PATH,
        node_provider.IN_CLUSTER_CA_CERT_PATH,
    }
    for pod in pods(cluster):
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            assert mount["name"] not in [each["name"] for each in container.get("volumeMounts", ())]


def test_the_service_is_started_again_in_a_pod_that_is_not(cluster):
    (service,) = cluster["headGroupSpec"]["template"]["spec"]["initContainers"]
    assert (service["name"], service["restartPolicy"]) == ("service", "Always")
    # The second autoscaler's pods end with their Ray container, and the operator refuses any other policy of theirs.
    assert all("restartPolicy" not in pod for pod in pods(cluster))


def test_the_heads_service_has_the_ports_that_are_forwarded(cluster):
    # The operator makes that Kubernetes Service of the first container's ports, and `kubectl port-forward svc/` knows
    # no others.
    (forward,) = re.findall(r"kubectl port-forward svc/moedisco-head-svc (.+)", (FOLDER / "kuberay.yaml").read_text())
    ports = {
        str(port["containerPort"]) for port in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert set(forward.split()) <= ports


def test_only_the_cluster_itself_and_the_operator_reach_it(cluster):
    policy = of_kind("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    peers = [peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]]
    assert peers == [{"ray.io/cluster": "moedisco"}, {"app.kubernetes.io/name": "kuberay-operator"}]
    assert cluster["authOptions"] == {"mode": "token"}


def test_what_the_service_remembers_outlives_the_head(cluster):
    claim = of_kind("PersistentVolumeClaim")
    assert (claim["metadata"]["name"], claim["spec"]["accessModes"]) == ("moedisco-state", ["ReadWriteOnce"])
    assert {"name": "state", "persistentVolumeClaim": {"claimName": "moedisco-state"}} in pods(cluster)[0]["volumes"]


def test_a_driver_has_a_minute_to_end_as_the_page_says(cluster):
    (driver,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"} in driver["env"]
    assert "\nexport RAY_JOB_STOP_WAIT_TIME_S=60 " in (FOLDER / "node" / "environment.sh").read_text()


def test_pods_share_a_folder_of_a_bucket_and_no_volume(cluster):
    (service,) = cluster["headGroupSpec"]["template"]["spec"]["initContainers"]
    assert [word for word in service["args"] if "-root=" in word] == [
        "--output-root=gs://MY_BUCKET/moedisco/runs",
        "--input-root=gs://MY_BUCKET/moedisco/data",
    ]
    assert "--home-dir=/moedisco/requests" in service["args"]
    assert "--set output=gs://MY_BUCKET/moedisco/runs " in of_kind("RayJob")["spec"]["entrypoint"]
    for pod in pods(cluster):
        assert {"name": "cache", "emptyDir": {}} in pod["volumes"]
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert {"name": "cache", "mountPath": "/moedisco/cache"} in container["volumeMounts"]
            environment = {each["name"]: each.get("value") for each in container["env"]}
            assert (environment["MOEDISCO_CACHE_DIR"], environment["MOEDISCO_CACHE_GB"]) == ("/moedisco/cache", "40")
    (driver,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    requests = {"name": "state", "mountPath": "/moedisco/requests", "subPath": "requests"}
    assert requests in driver["volumeMounts"]
    assert requests in service["volumeMounts"]
    assert "/moedisco/state" not in [mount["mountPath"] for mount in driver["volumeMounts"]]
    for pod in pods(cluster)[1:]:
        assert not [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
