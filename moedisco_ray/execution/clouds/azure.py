"""Notices of Azure: scheduled events, at least 30 seconds ahead of a spot machine's end.

The list holds the events of all machines of a scale set; only those that name this machine count. The first request
enables the service and may take two minutes. Events are not acknowledged: that would end the machine earlier.
Documented in "Scheduled Events for Linux VMs" of the Virtual Machines guides.
"""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

from moedisco_ray.execution.clouds.declaration import Cloud
from moedisco_ray.execution.clouds.metadata import Notice, Service, Unavailable

_HEADERS = {"Metadata": "true"}
_ENDING = ("Preempt", "Terminate", "Redeploy", "Reboot")
"""Types of scheduled events that end the machine's processes. A `Freeze` lasts seconds and loses nothing."""


class Azure:
    """Client of Azure's metadata service.

    Args:
        service: HTTP client of the metadata service.
    """

    name = "azure"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._machine: str | None = None

    def recognised(self) -> bool:
        """Whether this is an Azure machine: its service returns the machine's name."""
        self._machine = self._own_name()
        return True

    def poll(self, max_wait: float) -> Notice | None:  # noqa: ARG002 - the service responds at once
        """A notice of the earliest event that ends this machine; None if there is no such event."""
        if self._machine is None:
            self._machine = self._own_name()
        answer = self._service.request("/metadata/scheduledevents?api-version=2020-07-01", _HEADERS)
        if answer.status != 200:
            raise Unavailable(f"scheduled events: HTTP {answer.status}")
        ending = [event for event in _events(answer.text) if self._ends_this(event)]
        if not ending:
            return None
        first = min(ending, key=_begins)
        return Notice("end", _begins(first), f"Azure {first['EventType']}")

    def _ends_this(self, event: dict[str, Any]) -> bool:
        resources = event.get("Resources")
        return event.get("EventType") in _ENDING and isinstance(resources, list) and self._machine in resources

    def _own_name(self) -> str:
        answer = self._service.request("/metadata/instance/compute/name?api-version=2021-02-01&format=text", _HEADERS)
        name = answer.text.strip()
        if answer.status != 200 or not name or len(name) > 256 or not name.isprintable():
            raise Unavailable(f"the machine's name: HTTP {answer.status}")
        return name


def _events(text: str) -> list[dict[str, Any]]:
    try:
        events = json.loads(text)["Events"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Unavailable("scheduled events: not the documented list") from error
    return [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []


def _begins(event: dict[str, Any]) -> float:
    """Time at which an event begins (s since the epoch); now if it has begun or states no readable time."""
    try:
        return email.utils.parsedate_to_datetime(event.get("NotBefore") or "").timestamp()
    except (TypeError, ValueError):
        return time.time()


CLOUD = Cloud(
    "azure",
    "Azure",
    Azure,
    capacity=frozenset(
        {
            "AllocationFailed",
            "OverconstrainedAllocationRequest",
            "OverconstrainedZonalAllocationRequest",
            "SkuNotAvailable",
            "ZonalAllocationFailed",
        }
    ),
    quota=frozenset({"QuotaExceeded"}),
    said_quota=frozenset({"OperationNotAllowed"}),
    worker_identity=True,
)
