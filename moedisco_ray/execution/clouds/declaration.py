"""What the project knows of a cloud, besides the files in `cluster_yaml/NAME/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moedisco_ray.execution.clouds.metadata import Provider, Service


@dataclasses.dataclass(frozen=True)
class Cloud:
    """A cloud whose machines Ray starts.

    Attributes:
        name: Ray's name of the cloud.
        launcher: Name of its launcher in cluster files, after `execution.ray.autoscaling.spot_fallback.`.
        client: Makes a client of its metadata service.
        capacity: Error codes for machines that the cloud does not have at present.
        quota: Error codes for machines that the account's quota does not allow.
        said_quota: Error codes that mean a quota if the error's text says so.
        zone_by_zone: Whether Ray's launcher tries several zones by itself, and reports the error of the last one alone.
        worker_identity: Whether Ray's launcher gives all machines the identity of the head, which may start machines.
    """

    name: str
    launcher: str
    client: Callable[[Service], Provider]
    capacity: frozenset[str]
    quota: frozenset[str]
    said_quota: frozenset[str] = frozenset()
    zone_by_zone: bool = False
    worker_identity: bool = False
