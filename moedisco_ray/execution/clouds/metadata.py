"""The metadata service of a cloud machine (plain HTTP at a link-local address) and the notices that it may give."""

from __future__ import annotations

import dataclasses
import http.client
import time
from collections.abc import Mapping
from typing import Literal, Protocol
from urllib.parse import urlsplit

from moedisco_ray.core.errors import MoeDiscoError

_LARGEST_ANSWER = 1 << 20


class Unavailable(MoeDiscoError):  # noqa: N818 - a normal state while a machine boots
    """The metadata service did not respond, or its response was not as documented."""


@dataclasses.dataclass(frozen=True)
class Notice:
    """A notice of the cloud about this machine.

    Attributes:
        kind: `end` if the machine will end; `risk` if the machine may end soon, but this is not decided.
        deadline: Time at which the machine ends, in seconds since the epoch; for `risk`, the time of the announcement.
        reason: Description of the notice in one line, for a log.
    """

    kind: Literal["end", "risk"]
    deadline: float
    reason: str


class Provider(Protocol):
    """Client of one cloud's metadata service."""

    name: str

    def recognised(self) -> bool:
        """Whether this machine belongs to the cloud."""

    def poll(self, max_wait: float) -> Notice | None:
        """The current notice; None if there is none.

        Args:
            max_wait: Seconds for which the service may hold the request open until something changes.

        Raises:
            Unavailable: The service did not respond; poll again later.
        """


@dataclasses.dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    text: str


class Service:
    """HTTP client of a metadata service.

    It uses no proxy and follows no redirection: the service is local to this machine.

    Args:
        url: Address of the service, such as http://169.254.169.254.
        timeout: Seconds after which a request fails if no byte arrives, or if the body is still incomplete.
    """

    def __init__(self, url: str, timeout: float = 2.0) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port
        self._timeout = timeout

    def request(self, path: str, headers: Mapping[str, str], *, method: str = "GET", max_wait: float = 0.0) -> Answer:
        """Send one request and read the response.

        Args:
            path: Path and query.
            headers: Request headers.
            method: `GET` or `PUT`.
            max_wait: Seconds for which the service was asked to hold the request open; they are added to the timeout.

        Raises:
            Unavailable: No complete response arrived in time.
        """
        deadline = time.monotonic() + self._timeout + max_wait
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout + max_wait)
        try:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            body = _read(response, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            body.decode("utf-8", "replace"),
        )


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    body = b""
    while chunk := response.read1(65536):
        body += chunk
        # A socket's timeout starts anew with every byte.
        if time.monotonic() > deadline:
            raise TimeoutError("the answer does not end")
        if len(body) > _LARGEST_ANSWER:
            raise http.client.HTTPException("the answer is too long")
    return body
