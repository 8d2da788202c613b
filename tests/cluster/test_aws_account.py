"""The stack of aws/account.yaml on a server that speaks AWS, and the disk that outlives the head."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from aws_offline import REGION, Template, aws_server, client, deploy_account, role_statements
from cluster_files import FOLDER


@pytest.fixture(scope="module")
def aws():
    with aws_server() as url:
        deploy_account(url)
        yield url


def actions(statements):
    return {
        action
        for statement in statements
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }


def is_about_storage(statement):
    return any(action.startswith("s3:") for action in actions([statement]))


def test_cloudformation_accepts_the_template():
    linter = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run(
        [linter, FOLDER / "aws/account.yaml", "--regions", REGION], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_stack_makes_the_spot_role_unless_the_account_has_it_and_never_deletes_it():
    template = yaml.load((FOLDER / "aws/account.yaml").read_text(), Template)
    role = template["Resources"]["SpotServiceRole"]
    assert role["Type"] == "AWS::IAM::ServiceLinkedRole"
    assert role["Properties"] == {"AWSServiceName": "spot.amazonaws.com"}
    assert (role["DeletionPolicy"], role["UpdateReplacePolicy"]) == ("Retain", "Retain")
    assert template["Parameters"]["SpotRole"]["Default"] == "create"
    assert template["Conditions"][role["Condition"]] == {"Fn::Equals": [{"Ref": "SpotRole"}, "create"]}


@pytest.mark.slow
@pytest.mark.parametrize("role", ["moedisco-worker", "moedisco-head"])
def test_nodes_use_one_folder_of_one_bucket_and_may_do_nothing_else_in_storage(aws, role):
    statements = [each for each in role_statements(aws, role) if is_about_storage(each)]
    assert role != "moedisco-worker" or statements == role_statements(aws, role)
    files, listing = statements
    assert actions([files]) == {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    assert files["Resource"] == ["arn:aws:s3:::corpus/moedisco", "arn:aws:s3:::corpus/moedisco/*"]
    assert actions([listing]) == {"s3:ListBucket"}
    assert listing["Resource"] == "arn:aws:s3:::corpus"
    assert listing["Condition"] == {"StringLike": {"s3:prefix": ["moedisco", "moedisco/*"]}}


@pytest.mark.slow
def test_the_head_changes_only_what_is_the_clusters(aws):
    statements = role_statements(aws, "moedisco-head")
    for statement in statements:
        assert not any("*" in action for action in actions([statement]))
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions([statement]))
        if actions([statement]) & {"ec2:TerminateInstances"}:
            assert statement["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "moedisco"}}
    passed = [statement["Resource"] for statement in statements if statement["Action"] == "iam:PassRole"]
    assert [arn.rsplit("/", 1)[-1] for arn in passed] == ["moedisco-worker"]


def test_only_ssh_from_one_place_comes_in(aws):
    (group,) = client(aws, "ec2").describe_security_groups(Filters=[{"Name": "group-name", "Values": ["moedisco"]}])[
        "SecurityGroups"
    ]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpRanges"][0]["CidrIp"]) for rule in outside] == [
        (22, 22, "203.0.113.7/32")
    ]
    inside = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
    assert inside == [group["GroupId"]]


def test_the_image_stays_what_it_was_when_the_stack_was_made(aws):
    pinned = client(aws, "ssm").get_parameter(Name="/moedisco/image")["Parameter"]["Value"]
    assert pinned.startswith("ami-")


def test_the_state_disk_goes_from_a_lost_head_to_the_next(aws):
    spec = importlib.util.spec_from_file_location("attach_disk", FOLDER / "aws" / "attach_disk.py")
    attach_disk = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(attach_disk)
    ec2 = client(aws, "ec2")
    image = client(aws, "ssm").get_parameter(Name="/moedisco/image")["Parameter"]["Value"]
    first, second = (
        machine["InstanceId"]
        for machine in ec2.run_instances(
            ImageId=image, MinCount=2, MaxCount=2, Placement={"AvailabilityZone": f"{REGION}a"}
        )["Instances"]
    )

    device = attach_disk.attach(ec2, first, f"{REGION}a")
    assert device.startswith("/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol")
    assert attach_disk.attach(ec2, first, f"{REGION}a") == device, "a second time changes nothing"
    (volume,) = ec2.describe_volumes(Filters=[{"Name": "tag:Name", "Values": ["moedisco-state"]}])["Volumes"]
    ec2.detach_volume(VolumeId=volume["VolumeId"], InstanceId=first)
    assert attach_disk.attach(ec2, second, f"{REGION}a") == device
    (volume,) = ec2.describe_volumes(VolumeIds=[volume["VolumeId"]])["Volumes"]
    assert [attachment["InstanceId"] for attachment in volume["Attachments"]] == [second]
    with pytest.raises(SystemExit, match="0 volumes named moedisco-state"):
        attach_disk.attach(ec2, second, f"{REGION}b")
