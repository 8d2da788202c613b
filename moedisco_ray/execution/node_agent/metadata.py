"""The metadata service of a cloud machine, over plain HTTP at a link-local address, and what it may announce."""

from __future__ import annotations

import dataclasses
import http.client
import time
from collections.abc import Mapping
from typing import Literal, Protocol
from urllib.parse import urlsplit

from moedisco_ray.core.errors import MoeDiscoError

ProviderName = Literal["aws", "gcp", "azure"]

_LARGEST_ANSWER = 1 << 20


class Unavailable(MoeDiscoError):  # noqa: N818 - a state of the service, met at every boot
    """The metadata service did not answer, or with something else than what it documents."""


@dataclasses.dataclass(frozen=True)
class Notice:
    """What was announced.

    Attributes:
        kind: `end`: the machine goes. `risk`: it may go soon; nothing is decided.
        deadline: When, in seconds since the epoch; of a risk, when it was announced.
        reason: One line for people.
    """

    kind: Literal["end", "risk"]
    deadline: float
    reason: str


class Provider(Protocol):
    """One cloud's way to announce."""

    name: ProviderName

    def recognised(self) -> bool:
        """Whether this machine is one of that cloud's."""

    def look(self, patience: float) -> Notice | None:
        """What is announced now.

        Args:
            patience: Seconds for which the service may be asked to hold the question open until something changes.

        Raises:
            Unavailable: Ask again later.
        """


@dataclasses.dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    text: str


class Service:
    """A metadata service. No proxy is asked, and no redirection followed: it is on this machine's own link.

    Args:
        url: Its address, such as http://169.254.169.254.
        timeout: Seconds without a byte, and for the whole body, that are put up with.
    """

    def __init__(self, url: str, timeout: float = 2.0) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port
        self._timeout = timeout

    def ask(self, path: str, headers: Mapping[str, str], *, method: str = "GET", patience: float = 0.0) -> Answer:
        """One exchange.

        Args:
            path: With its query.
            headers: To send.
            method: GET or PUT.
            patience: Seconds for which the service was asked to wait, on top of the timeout.

        Raises:
            Unavailable: No whole answer in time.
        """
        deadline = time.monotonic() + self._timeout + patience
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout + patience)
        try:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            body = _read(response, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        return Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()}, body.decode("utf-8", "replace"))


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    body = b""
    while chunk := response.read1(65536):
        body += chunk
        # A socket's timeout starts anew with every byte.
        if time.monotonic() > deadline:
            raise TimeoutError("its answer does not end")
        if len(body) > _LARGEST_ANSWER:
            raise http.client.HTTPException("its answer is too long to be one")
    return body
