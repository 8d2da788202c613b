"""Attach the managed disk moedisco-state to this Azure machine, and print its device."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from azure.identity import ManagedIdentityCredential
from azure.mgmt.compute import ComputeManagementClient

NAME = "moedisco-state"
LUN = 0
_METADATA = "http://169.254.169.254/metadata/instance/compute?api-version=2021-02-01"


def attach(compute: Any, group: str, machine: str) -> str:
    """Attach the state disk of a resource group to a machine, after detaching it from a lost head if necessary.

    Args:
        compute: Compute management client.
        group: Resource group of disk and machine.
        machine: Name of the machine.

    Returns:
        Path of the device.
    """
    disk = compute.disks.get(group, NAME)
    holder = disk.managed_by.rsplit("/", 1)[-1] if disk.managed_by else None
    if holder not in (None, machine):
        former = compute.virtual_machines.get(group, holder)
        former.storage_profile.data_disks = [each for each in former.storage_profile.data_disks if each.name != NAME]
        compute.virtual_machines.begin_create_or_update(group, holder, former).result()
    if holder != machine:
        present = compute.virtual_machines.get(group, machine)
        present.storage_profile.data_disks.append(
            {"lun": LUN, "name": NAME, "create_option": "Attach", "managed_disk": {"id": disk.id}}
        )
        compute.virtual_machines.begin_create_or_update(group, machine, present).result()
    return f"/dev/disk/azure/scsi1/lun{LUN}"


def _this_machine() -> dict[str, str]:
    request = urllib.request.Request(_METADATA, headers={"Metadata": "true"})
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        about: dict[str, str] = json.load(answer)
    return about


if __name__ == "__main__":
    here = _this_machine()
    client = ComputeManagementClient(ManagedIdentityCredential(), here["subscriptionId"])
    print(attach(client, here["resourceGroupName"], here["name"]))  # noqa: T201
