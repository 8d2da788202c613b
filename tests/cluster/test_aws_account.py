"""The stack of aws-account.yaml on a server that speaks AWS, and the disk that outlives the head."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from aws_offline import REGION, Template, aws_server, client, deploy_account
from cluster_files import FOLDER


@pytest.fixture(scope="module")
def aws():
    with aws_server() as url:
        deploy_account(url)
        yield url


def permissions(url, role):
    """Statements of a role, flat."""
    iam = client(url, "iam")
    names = iam.list_role_policies(RoleName=role)["PolicyNames"]
    documents = [iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"] for name in names]
    assert not iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
    # As text it comes in Python's quotes or in JSON's: YAML reads both.
    return [statement for document in documents for statement in yaml.safe_load(str(document))["Statement"]]


def actions(statements):
    return {action for statement in statements
            for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])}


def test_cloudformation_accepts_the_template():
    linter = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run(
        [linter, FOLDER / "aws-account.yaml", "--regions", REGION], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_stack_makes_the_spot_role_unless_the_account_has_it_and_never_deletes_it():
    template = yaml.load((FOLDER / "aws-account.yaml").read_text(), Template)
    role = template["Resources"]["SpotServiceRole"]
    assert role["Type"] == "AWS::IAM::ServiceLinkedRole"
    assert role["Properties"] == {"AWSServiceName": "spot.amazonaws.com"}
    assert (role["DeletionPolicy"], role["UpdateReplacePolicy"]) == ("Retain", "Retain")
    assert template["Parameters"]["SpotRole"]["Default"] == "create"
    assert template["Conditions"][role["Condition"]] == {"Fn::Equals": [{"Ref": "SpotRole"}, "create"]}


def test_workers_read_the_one_bucket_and_may_do_nothing_else(aws):
    statements = permissions(aws, "moedisco-worker")
    assert actions(statements) == {"s3:ListBucket", "s3:GetBucketLocation", "s3:GetObject"}
    assert {statement["Resource"] for statement in statements} == {"arn:aws:s3:::corpus", "arn:aws:s3:::corpus/*"}


def test_the_head_changes_only_what_is_the_clusters(aws):
    statements = permissions(aws, "moedisco-head")
    for statement in statements:
        assert not any("*" in action for action in actions([statement]))
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions([statement]))
        if actions([statement]) & {"ec2:TerminateInstances"}:
            assert statement["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "moedisco"}}
    passed = [statement["Resource"] for statement in statements if statement["Action"] == "iam:PassRole"]
    assert [arn.rsplit("/", 1)[-1] for arn in passed] == ["moedisco-worker"]


def test_only_ssh_from_one_place_comes_in(aws):
    group, = client(aws, "ec2").describe_security_groups(Filters=[{"Name": "group-name", "Values": ["moedisco"]}])["SecurityGroups"]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpRanges"][0]["CidrIp"]) for rule in outside] == [(22, 22, "203.0.113.7/32")]
    inside = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
    assert inside == [group["GroupId"]]


def test_the_image_stays_what_it_was_when_the_stack_was_made(aws):
    pinned = client(aws, "ssm").get_parameter(Name="/moedisco/image")["Parameter"]["Value"]
    assert pinned.startswith("ami-")


def test_the_state_disk_goes_from_a_lost_head_to_the_next(aws):
    spec = importlib.util.spec_from_file_location("attach_ebs", FOLDER / "node" / "attach_ebs.py")
    attach_ebs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(attach_ebs)
    ec2 = client(aws, "ec2")
    image = client(aws, "ssm").get_parameter(Name="/moedisco/image")["Parameter"]["Value"]
    first, second = (machine["InstanceId"] for machine in ec2.run_instances(
        ImageId=image, MinCount=2, MaxCount=2, Placement={"AvailabilityZone": f"{REGION}a"})["Instances"])

    device = attach_ebs.attach(ec2, first, f"{REGION}a")
    assert device.startswith("/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol")
    assert attach_ebs.attach(ec2, first, f"{REGION}a") == device, "a second time changes nothing"
    volume, = ec2.describe_volumes(Filters=[{"Name": "tag:Name", "Values": ["moedisco-state"]}])["Volumes"]
    ec2.detach_volume(VolumeId=volume["VolumeId"], InstanceId=first)
    assert attach_ebs.attach(ec2, second, f"{REGION}a") == device
    volume, = ec2.describe_volumes(VolumeIds=[volume["VolumeId"]])["Volumes"]
    assert [attachment["InstanceId"] for attachment in volume["Attachments"]] == [second]
    with pytest.raises(SystemExit, match="0 volumes named moedisco-state"):
        attach_ebs.attach(ec2, second, f"{REGION}b")
