"""Attach the volume tagged Name=moedisco-state to this AWS instance, and print its device."""

from __future__ import annotations

import urllib.request
from typing import Any

import boto3

NAME = "moedisco-state"
DEVICE = "/dev/sdf"
PATIENCE_SECONDS = 180
_METADATA = "http://169.254.169.254/latest"


def attach(ec2: Any, instance: str, zone: str) -> str:
    """Attach the state volume of a zone to an instance, once a lost head has released it.

    Args:
        ec2: EC2 client.
        instance: Id of the instance.
        zone: Availability zone of volume and instance.

    Returns:
        Path of the device under /dev/disk/by-id.
    """
    found = ec2.describe_volumes(
        Filters=[{"Name": "tag:Name", "Values": [NAME]}, {"Name": "availability-zone", "Values": [zone]}]
    )["Volumes"]
    if len(found) != 1:
        raise SystemExit(
            f"{len(found)} volumes named {NAME} in {zone}; the stack of aws/account.yaml creates one in its Zone"
        )
    volume = found[0]["VolumeId"]
    holders = [attachment["InstanceId"] for attachment in found[0]["Attachments"] if attachment["State"] != "detached"]
    if holders != [instance]:
        # A head that terminates releases its volume within seconds.
        ec2.get_waiter("volume_available").wait(
            VolumeIds=[volume], WaiterConfig={"Delay": 3, "MaxAttempts": PATIENCE_SECONDS // 3}
        )
        ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device=DEVICE)
        ec2.get_waiter("volume_in_use").wait(
            VolumeIds=[volume], WaiterConfig={"Delay": 3, "MaxAttempts": PATIENCE_SECONDS // 3}
        )
    return f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}"


def _about(path: str, token: str) -> str:
    headers = {"X-aws-ec2-metadata-token": token}
    request = urllib.request.Request(f"{_METADATA}/meta-data/{path}", headers=headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        text: str = answer.read().decode()
    return text


def _token() -> str:
    request = urllib.request.Request(  # noqa: S310
        f"{_METADATA}/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        text: str = answer.read().decode()
    return text


if __name__ == "__main__":
    token = _token()
    zone = _about("placement/availability-zone", token)
    print(attach(boto3.client("ec2", region_name=zone[:-1]), _about("instance-id", token), zone))  # noqa: T201
