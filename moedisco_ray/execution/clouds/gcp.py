"""Notices of Compute Engine: preemption (about 30 s ahead) and maintenance that ends the machine (at least 60 s).

The metadata service holds the request for `preempted` open until the value changes. So a preemption is noticed at once,
not only at the next poll. Documented in "Detect if a VM was preempted" and "Query the metadata server for maintenance
event notices" of the Compute Engine guides.
"""

from __future__ import annotations

import time
from urllib.parse import quote

from moedisco_ray.execution.clouds.declaration import Cloud
from moedisco_ray.execution.clouds.metadata import Answer, Notice, Service, Unavailable

PREEMPTION_SECONDS, MAINTENANCE_SECONDS = 30.0, 60.0

_HEADERS = {"Metadata-Flavor": "Google"}
_VALUES = ("TRUE", "FALSE", "NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE")


class Gcp:
    """Client of Compute Engine's metadata service.

    Args:
        service: HTTP client of the metadata service.
    """

    name = "gcp"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._first_seen: dict[str, float] = {}

    def recognised(self) -> bool:
        """Whether this is a Compute Engine machine: its service identifies itself as Google's."""
        return self._service.request("/computeMetadata/v1/", _HEADERS).headers.get("metadata-flavor") == "Google"

    def poll(self, max_wait: float) -> Notice | None:
        """A notice of maintenance that ends the machine, otherwise of preemption, otherwise None."""
        if _value(self._get("maintenance-event")) == "TERMINATE_ON_HOST_MAINTENANCE":
            return self._notice("host maintenance", MAINTENANCE_SECONDS)
        answer = self._get("preempted")
        if _value(answer) == "FALSE" and max_wait >= 1:
            answer = self._get("preempted", int(max_wait), answer.headers.get("etag", "0"))
        return self._notice("preemption", PREEMPTION_SECONDS) if _value(answer) == "TRUE" else None

    def _notice(self, event: str, seconds: float) -> Notice:
        # The service gives no time: the deadline counts from the first poll that saw the notice.
        return Notice("end", self._first_seen.setdefault(event, time.time() + seconds), f"Compute Engine {event}")

    def _get(self, key: str, max_wait: int = 0, etag: str = "") -> Answer:
        # With the previous ETag, the service also reports at once a change that happened between the two requests.
        held = f"?wait_for_change=true&timeout_sec={max_wait}&last_etag={quote(etag)}" if max_wait else ""
        return self._service.request(f"/computeMetadata/v1/instance/{key}{held}", _HEADERS, max_wait=max_wait)


def _value(answer: Answer) -> str:
    if answer.status == 404:  # machines that cannot be preempted lack this key
        return "NONE"
    value = answer.text.strip()
    if answer.status != 200 or value not in _VALUES:
        raise Unavailable(f"HTTP {answer.status}, {value[:40]!r}")
    return value


CLOUD = Cloud(
    "gcp",
    "GCP",
    Gcp,
    capacity=frozenset({"ZONE_RESOURCE_POOL_EXHAUSTED", "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "stockout"}),
    quota=frozenset({"QUOTA_EXCEEDED", "quotaExceeded"}),
)
