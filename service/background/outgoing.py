"""Sends requests to URLs that users chose, on the public Internet but not in private networks.

A host name is resolved once. The connection uses one of the addresses that were checked, so that a changed DNS entry cannot
redirect it. HTTP redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Mapping

import httpx

Resolve = Callable[[str, int], list[str]]
"""Function that returns the IP addresses of a host name and port; raises OSError if there are none."""

TIMEOUT = httpx.Timeout(10, connect=5)
"""Maximum time for one step of a request, such as to receive a part of the response, in seconds."""
DEADLINE = 15.0
"""Maximum time of a request, in seconds, without the search for the host's address. A receiver that sends its response byte by byte
keeps to `TIMEOUT`, and would hold a worker for as long as it likes."""
_HIGHEST_PORT = 65_535
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Undeliverable(Exception):  # noqa: N818 - describes the message
    """A request to a webhook failed or is not allowed."""


class Outgoing:
    """HTTP client for webhook deliveries.

    Args:
        allow_private: Whether requests to this machine and to private networks are allowed.
        resolve: Resolver for tests; None uses the system's.
        transport: Transport for tests; None uses the network.
    """

    def __init__(
        self, *, allow_private: bool = False, resolve: Resolve | None = None, transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._resolve = _resolve if resolve is None else resolve
        self._transport = transport
        self._tls = httpx.create_ssl_context(trust_env=False)

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Post a body and return the status of the response; the response's body is not read.

        Raises:
            Undeliverable: No response arrived, or the address is not allowed.
        """
        try:
            target = httpx.URL(url)
            address = self._address(target)
            return asyncio.run(self._post(target, address, body, headers))
        except TimeoutError as error:
            raise Undeliverable(f"no response within {DEADLINE:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise Undeliverable(f"{type(error).__name__}: {error}") from error
        except (httpx.InvalidURL, ValueError) as error:
            raise Undeliverable(f"not a URL: {error}") from error

    async def _post(self, target: httpx.URL, address: str, body: bytes, headers: Mapping[str, str]) -> int:
        client = httpx.AsyncClient(verify=self._tls, timeout=TIMEOUT, trust_env=False, transport=self._transport)
        async with asyncio.timeout(DEADLINE), client, client.stream(
            "POST", target.copy_with(host=address), content=body, follow_redirects=False,
            # The certificate must match the host name, not the address.
            headers={**headers, "Host": target.netloc.decode()}, extensions={"sni_hostname": target.host},
        ) as answer:
            return answer.status_code

    def _address(self, target: httpx.URL) -> str:
        port = target.port or (443 if target.scheme == "https" else 80)
        if target.scheme not in ("http", "https") or not target.host or port > _HIGHEST_PORT:
            raise Undeliverable("not an http or https URL")
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


def is_public(address: str) -> bool:
    """Whether an address is on the public Internet, not on this machine, a private network or a cloud's link-local network.

    An IPv6 address that embeds an IPv4 address is judged by the IPv4 address. Text that is no address is not public.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = _embedded_ipv4(parsed)
        if inner is not None:
            parsed = inner
    return parsed.is_global and not parsed.is_multicast


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None
