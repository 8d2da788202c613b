"""Requests to addresses that users named: they reach the open Internet, and nothing of ours.

A name is resolved once. Its addresses are checked, and the connection goes to one of those, whatever the name means by
then. Redirects are answers like others.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

import httpx

from service.domain.addresses import is_public

Resolve = Callable[[str, int], list[str]]
"""Addresses of a host and port; raises OSError where there are none."""

TIMEOUT = httpx.Timeout(10, connect=5)


class Undeliverable(Exception):  # noqa: N818 - says what the message is
    """The request could not be made, or must not be."""


class Outgoing:
    """Posts messages.

    Args:
        allow_private: Whether addresses of this machine and of private networks may be reached as well.
        resolve: For tests; null: the system's resolver.
        transport: For tests; null: the network.
    """

    def __init__(
        self, *, allow_private: bool = False, resolve: Resolve | None = None, transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._resolve = _resolve if resolve is None else resolve
        self._client = httpx.Client(timeout=TIMEOUT, follow_redirects=False, trust_env=False, transport=transport)

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Post a body and return the answer's status; what it says is not read.

        Raises:
            Undeliverable: No answer came, or the address is not allowed.
        """
        try:
            target = httpx.URL(url)
            address = self._address(target)
            request = self._client.build_request(
                "POST", target.copy_with(host=address), content=body,
                # The certificate is that of the name, not of the address.
                headers={**headers, "Host": target.netloc.decode()}, extensions={"sni_hostname": target.host})
            answer = self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise Undeliverable(f"{type(error).__name__}: {error}") from error
        except (httpx.InvalidURL, ValueError) as error:
            raise Undeliverable(f"not a URL: {error}") from error
        answer.close()
        return answer.status_code

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _address(self, target: httpx.URL) -> str:
        if target.scheme not in ("http", "https") or not target.host:
            raise Undeliverable("not an http or https URL")
        port = target.port or (443 if target.scheme == "https" else 80)
        try:
            addresses = self._resolve(target.host, port)
        except OSError as error:
            raise Undeliverable(f"{target.host} has no address ({error.strerror or error})") from error
        allowed = [address for address in addresses if self._allow_private or is_public(address)]
        if not allowed:
            raise Undeliverable(f"{target.host} is not a public address")
        return allowed[0]


def _resolve(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
