"""Compute Engine: preemption, about 30 seconds ahead, and host maintenance that ends the machine, at least 60 ahead.

The question for preemption is held open by the service until its answer changes, so that none of the 30 seconds is lost
between two polls. Documented in "Detect if a VM was preempted" and "Query the metadata server for maintenance event
notices" of the Compute Engine guides.
"""

from __future__ import annotations

import time
from urllib.parse import quote

from moedisco_ray.execution.node_agent.metadata import Answer, Notice, ProviderName, Service, Unavailable

PREEMPTION_SECONDS, MAINTENANCE_SECONDS = 30.0, 60.0

_HEADERS = {"Metadata-Flavor": "Google"}
_WORDS = ("TRUE", "FALSE", "NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE")


class Gcp:
    """Client of Compute Engine's metadata service.

    Args:
        service: Where it is.
    """

    name: ProviderName = "gcp"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._heard: dict[str, float] = {}

    def recognised(self) -> bool:
        """Whether the service says that it is Google's."""
        return self._service.ask("/computeMetadata/v1/", _HEADERS).headers.get("metadata-flavor") == "Google"

    def look(self, patience: float) -> Notice | None:
        """Maintenance that ends the machine, else preemption."""
        if _word(self._ask("maintenance-event")) == "TERMINATE_ON_HOST_MAINTENANCE":
            return self._notice("host maintenance", MAINTENANCE_SECONDS)
        answer = self._ask("preempted")
        if _word(answer) == "FALSE" and patience >= 1:
            answer = self._ask("preempted", int(patience), answer.headers.get("etag", "0"))
        return self._notice("preemption", PREEMPTION_SECONDS) if _word(answer) == "TRUE" else None

    def _notice(self, what: str, seconds: float) -> Notice:
        # The service gives no time: the deadline counts from when it was first heard of, however often it is asked.
        return Notice("end", self._heard.setdefault(what, time.time() + seconds), f"Compute Engine {what}")

    def _ask(self, key: str, patience: int = 0, etag: str = "") -> Answer:
        # With the tag, a change between the two questions is answered at once.
        held = f"?wait_for_change=true&timeout_sec={patience}&last_etag={quote(etag)}" if patience else ""
        return self._service.ask(f"/computeMetadata/v1/instance/{key}{held}", _HEADERS, patience=patience)


def _word(answer: Answer) -> str:
    if answer.status == 404:    # a machine that cannot be preempted has no such key
        return "NONE"
    word = answer.text.strip()
    if answer.status != 200 or word not in _WORDS:
        raise Unavailable(f"HTTP {answer.status}, {word[:40]!r}")
    return word
