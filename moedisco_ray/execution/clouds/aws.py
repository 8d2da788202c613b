"""Notices of EC2: spot interruption, about two minutes ahead, and rebalance recommendation, which may come earlier.

Both return 404 until they are issued. IMDSv2 requires a session token, which expires; after a response 401 the client
requests a new one. Documented in "Spot Instance interruption notices" and "EC2 instance rebalance recommendations" of
the EC2 user guide.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from typing import Any

from moedisco_ray.execution.clouds.declaration import Cloud
from moedisco_ray.execution.clouds.metadata import Answer, Notice, Service, Unavailable

NOTICE_SECONDS = 120.0
"""Seconds from the notice to the end of the machine, assumed if the notice does not state the time."""

_TOKEN_SECONDS = 21600  # the maximum that EC2 allows


class Aws:
    """Client of EC2's metadata service.

    Args:
        service: HTTP client of the metadata service.
    """

    name = "aws"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._token: str | None = None

    def recognised(self) -> bool:
        """Whether this is an EC2 machine: its service issues a session token."""
        self._token = self._new_token()
        return True

    def poll(self, max_wait: float) -> Notice | None:  # noqa: ARG002 - the service responds at once
        """The interruption notice if there is one, otherwise the rebalance recommendation, otherwise None."""
        action = self._get("/latest/meta-data/spot/instance-action", "action")
        if action is not None:
            due = _time(action.get("time"), time.time() + NOTICE_SECONDS)
            return Notice("end", due, f"EC2 spot interruption: {action['action']}")
        risk = self._get("/latest/meta-data/events/recommendations/rebalance", "noticeTime")
        if risk is not None:
            return Notice("risk", _time(risk["noticeTime"], time.time()), "EC2 rebalance recommendation")
        return None

    def _get(self, path: str, key: str) -> dict[str, Any] | None:
        if self._token is None:
            self._token = self._new_token()
        answer = self._with_token(path, self._token)
        if answer.status == 401:
            self._token = self._new_token()
            answer = self._with_token(path, self._token)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise Unavailable(f"{path}: HTTP {answer.status}")
        return _document(path, answer.text, key)

    def _with_token(self, path: str, token: str) -> Answer:
        return self._service.request(path, {"X-aws-ec2-metadata-token": token})

    def _new_token(self) -> str:
        answer = self._service.request(
            "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}, method="PUT"
        )
        if answer.status != 200 or not answer.text.isascii() or not answer.text.isprintable() or not answer.text:
            raise Unavailable(f"no session token: HTTP {answer.status}")
        return answer.text


def _document(path: str, text: str, key: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unavailable(f"{path}: not JSON") from error
    if not isinstance(document, dict) or not isinstance(document.get(key), str):
        raise Unavailable(f"{path}: no object with {key!r}")
    return document


def _time(text: Any, otherwise: float) -> float:
    """Convert an ISO time in UTC to seconds since the epoch; an unreadable time gives `otherwise`."""
    try:
        moment = dt.datetime.fromisoformat(str(text))
    except ValueError:
        return otherwise
    return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()


CLOUD = Cloud(
    "aws",
    "AWS",
    Aws,
    capacity=frozenset({"InsufficientInstanceCapacity", "SpotMaxPriceTooLow"}),
    quota=frozenset({"InstanceLimitExceeded", "MaxSpotInstanceCountExceeded", "VcpuLimitExceeded"}),
    zone_by_zone=True,
)
