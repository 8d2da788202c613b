"""AWS without AWS: Ray's launcher and autoscaler with aws/spot.yaml against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import botocore.exceptions
import pytest
import yaml
from autoscaling import Turns
from aws_offline import (
    ROOT,
    aws_server,
    client,
    cluster_file,
    credentials,
    deploy_account,
    empty,
    instances,
    stand_ins,
    tags,
)
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import (
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.execution.ray import ray_internals
from moedisco_ray.execution.ray.autoscaling import spot_fallback

RAY = Path(sys.executable).with_name("ray")
POOLS = RunConfig.model_validate(yaml.safe_load(preset_text("default"))).pools
BUNDLE = {pool.name: Placement(pool, 1, 0).bundle for pool in (POOLS.low_memory, POOLS.high_memory)}
"""What a trainer's worker asks Ray for."""


@pytest.fixture(scope="module")
def server():
    with aws_server() as url:
        yield url


@pytest.fixture
def aws(server, monkeypatch, tmp_path):
    empty()
    for name, value in (credentials(server) | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    deploy_account(server)
    return server


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """What the autoscaler publishes for the runs, as (key, node types)."""
    told = []
    monkeypatch.setattr(
        ray_internals, "kv_put_from_head", lambda key, value, _namespace: told.append((key, json.loads(value)))
    )
    return told


@pytest.fixture
def config(aws):
    return bootstrap_aws(prepare_config(cluster_file()))


@pytest.fixture
def provider(config):
    return spot_fallback.AWS(config["provider"], config["cluster_name"])


def start(provider, config, name, kind="worker"):
    node_type = config["available_node_types"][name]
    provider.create_node_with_resources_and_labels(
        node_type["node_config"],
        {
            TAG_RAY_NODE_KIND: kind,
            TAG_RAY_USER_NODE_TYPE: name,
            TAG_RAY_NODE_STATUS: "up-to-date",
            TAG_RAY_LAUNCH_CONFIG: "test",
            TAG_RAY_NODE_NAME: name,
        },
        1,
        node_type["resources"],
        node_type.get("labels", {}),
    )


def asked_for(provider, refuse, code="InsufficientInstanceCapacity"):
    """Types that the provider asks for from now on, as (type, spot); those that `refuse` get the code as an answer."""
    asked = []

    def answer(params, **_):
        request = params["body"]
        what = request["InstanceType"], request.get("InstanceMarketOptions.MarketType") == "spot"
        if asked[-1:] != [what]:
            asked.append(what)
        if refuse(*what):
            raise botocore.exceptions.ClientError({"Error": {"Code": code, "Message": "there is none"}}, "RunInstances")

    provider.ec2_fail_fast.meta.client.meta.events.register("before-call.ec2.RunInstances", answer)
    return asked


def test_every_node_type_starts_the_machine_that_the_file_names(aws, config, provider):
    for name in config["available_node_types"]:
        start(provider, config, name, "head" if name == "head" else "worker")
    started = {tags(machine)[TAG_RAY_USER_NODE_TYPE]: machine for machine in instances(aws)}
    (group,) = client(aws, "ec2").describe_security_groups(Filters=[{"Name": "group-name", "Values": ["moedisco"]}])[
        "SecurityGroups"
    ]
    assert started.keys() == config["available_node_types"].keys()
    for name, kind in config["available_node_types"].items():
        machine, node = started[name], kind["node_config"]
        assert machine["InstanceType"] == node["InstanceType"]
        assert (machine.get("InstanceLifecycle") == "spot") == name.endswith("-spot")
        assert tags(machine)["ray-cluster-name"] == "moedisco"
        assert [each["GroupId"] for each in machine["SecurityGroups"]] == [group["GroupId"]]
        assert machine["IamInstanceProfile"]["Arn"].endswith("moedisco-head" if name == "head" else "moedisco-worker")
        assert machine["Placement"]["AvailabilityZone"] == "us-east-1a"
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"]


def test_low_memory_demand_that_is_refused_goes_to_the_next_type_and_at_last_on_demand(aws, config, provider):
    start(provider, config, "head", "head")
    asked = asked_for(provider, lambda _, spot: spot)
    turns = Turns(config, provider, instances(aws)[0]["InstanceId"])
    for _ in range(40):
        turns.take(BUNDLE["low_memory"])
        if len(instances(aws)) == 2:
            break
    assert asked == [("g6.xlarge", True), ("g5.xlarge", True), ("g6.xlarge", False)]
    assert [machine["InstanceType"] for machine in instances(aws)[1:]] == ["g6.xlarge"]


@pytest.mark.slow
def test_a_gang_of_the_high_pool_falls_back_to_on_demand(aws, config, provider):
    start(provider, config, "head", "head")
    asked = asked_for(provider, lambda _, spot: spot)
    turns = Turns(config, provider, instances(aws)[0]["InstanceId"])
    for _ in range(40):
        turns.take(BUNDLE["high_memory"], 2, gang=True)
        if len(instances(aws)) == 3:
            break
    assert asked[0] == ("p5.4xlarge", True)
    assert asked[-1] == ("p5.4xlarge", False)
    assert {machine["InstanceType"] for machine in instances(aws)[1:]} == {"p5.4xlarge"}


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", "correct the account or the cluster file"),
        (
            "MaxSpotInstanceCountExceeded",
            "request a higher quota, or lower max_workers of low-l4-spot in the cluster file",
        ),
    ],
)
def test_a_refusal_that_waiting_does_not_cure_leads_to_no_other_type_and_is_reported(
    aws, config, provider, published, caplog, code, remedy
):
    start(provider, config, "head", "head")
    asked = asked_for(provider, lambda _, spot: spot, code)
    turns = Turns(config, provider, instances(aws)[0]["InstanceId"])
    caplog.set_level("WARNING", logger=spot_fallback.__name__)
    deadline = time.monotonic() + 60
    while not published:
        assert time.monotonic() < deadline
        turns.take(BUNDLE["low_memory"])
    for _ in range(10):
        turns.take(BUNDLE["low_memory"])
    assert set(asked) == {("g6.xlarge", True)}
    assert len(instances(aws)) == 1
    key, told = published[-1]
    assert (key, list(told)) == ("launch_failures", ["low-l4-spot"])
    _, text = told["low-l4-spot"]
    assert text.startswith(
        f"the cloud refuses to start low-l4-spot (Node Launch Exception ({code}): there is none): {remedy};"
    )
    assert [record.getMessage() for record in caplog.records if record.name == spot_fallback.__name__] == [text]


def test_a_zone_that_lacks_capacity_counts_more_than_one_that_does_not_offer_the_machine(aws, config, provider):
    subnets = config["available_node_types"]["high-h100-spot"]["node_config"]["SubnetIds"]
    assert len(subnets) > 1

    def answer(params, **_):
        code = "InsufficientInstanceCapacity" if params["body"]["SubnetId"] == subnets[0] else "Unsupported"
        raise botocore.exceptions.ClientError({"Error": {"Code": code, "Message": "no"}}, "RunInstances")

    provider.ec2_fail_fast.meta.client.meta.events.register("before-call.ec2.RunInstances", answer)
    with pytest.raises(ray_internals.NodeLaunchException, match="InsufficientInstanceCapacity"):
        start(provider, config, "high-h100-spot")


def test_a_gang_stays_in_one_zone_and_other_workers_take_any(aws, config, provider):
    subnets = config["available_node_types"]["high-h100-spot"]["node_config"]["SubnetIds"]
    full = {subnets[0]}

    def answer(params, **_):
        if params["body"]["SubnetId"] in full:
            raise botocore.exceptions.ClientError(
                {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "no"}}, "RunInstances"
            )

    provider.ec2_fail_fast.meta.client.meta.events.register("before-call.ec2.RunInstances", answer)
    start(provider, config, "high-h100-spot")
    full.clear()
    start(provider, config, "high-h100")
    start(provider, config, "low-l4-spot")
    zones = {}
    for machine in instances(aws):
        zones.setdefault(machine["InstanceType"], []).append(machine["SubnetId"])
    assert zones == {"p5.4xlarge": [subnets[1]] * 2, "g6.xlarge": [subnets[0]]}
    full.add(subnets[1])
    with pytest.raises(ray_internals.NodeLaunchException, match="InsufficientInstanceCapacity"):
        start(provider, config, "high-h100-spot")


def test_work_for_processors_never_starts_a_gpu(aws, config, provider):
    start(provider, config, "head", "head")
    asked = asked_for(provider, lambda _, spot: spot)
    turns = Turns(config, provider, instances(aws)[0]["InstanceId"])
    deadline = time.monotonic() + 60
    while len(instances(aws)) == 1:
        assert time.monotonic() < deadline
        turns.take({"CPU": 1}, 300)  # more than all nodes for it offer
    for _ in range(5):
        turns.take({"CPU": 1}, 300)
    assert set(asked) == {("m6i.4xlarge", True), ("m6i.4xlarge", False)}
    assert {machine["InstanceType"] for machine in instances(aws)[1:]} == {"m6i.4xlarge"}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ray_up_and_ray_down(aws, tmp_path):
    log = tmp_path / "commands"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    path = f"{stand_ins(tmp_path / 'bin', log)}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "TERM": "dumb"}

    def ray(command):
        done = subprocess.run(
            [RAY, command, "cluster_yaml/aws/spot.yaml", "--yes", *(["--no-config-cache"] if command == "up" else [])],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    ray("up")
    (head,) = instances(aws, "running", "pending")
    assert (head["InstanceType"], head.get("InstanceLifecycle")) == ("m6i.xlarge", None)
    assert tags(head)[TAG_RAY_NODE_KIND] == "head"
    said = log.read_text()
    for expected in ("echo s3://MY_BUCKET", "install.sh", "attach_disk.py", "RAY_OVERRIDE_RESOURCES", "cluster_yaml/"):
        assert expected in said, f"{expected} in {said}"
    assert ".venv/ " not in said
    assert "pip install" not in said, "Ray's defaults would bring a nightly build"
    ray("down")
    assert not instances(aws, "running", "pending", "stopping", "stopped")
