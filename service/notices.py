"""Sends notices to the URLs of projects: over https to addresses on the Internet only, or with apprise.

People who may edit a project choose its URL, so the service must reach nothing for them that they could not reach
themselves: no address of this machine or of its network, and no redirect. The address is looked up once, checked, and
connected to.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.errors import Conflict

TIMEOUT = httpx.Timeout(10, connect=5)
"""Maximum time for one step of a request, in seconds."""
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""Addresses that a gateway translates to addresses of IPv4, also to private ones."""
_MISSING = "needs the package of the extra moedisco-ray[notify] where the service runs"


def is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found.sixtofour or found.teredo or found in _TRANSLATED:
            return False
        found = found.ipv4_mapped or found
    return found.is_global and not found.is_multicast


def check_product(url: str) -> None:
    """Check that apprise reads a URL, if it is one of a product.

    Raises:
        Conflict: apprise is not installed.
        ValueError: apprise does not read the URL.
    """
    if urlsplit(url).scheme != "https" and _plugin(url) is None:
        raise ValueError("apprise does not read this URL; compare it with that product's page of apprise")


def send(url: str, text: str, about: dict[str, Any], allows: Callable[[str], bool] = is_public) -> str | None:
    """Send a notice; returns why it was not accepted, None if it was. The reason has no part of the URL.

    Args:
        url: URL that `service.domain.notices.check_url` accepts.
        text: The notice for people.
        about: The notice for programs, which an https URL gets as JSON, with the text as `text`.
        allows: Whether an IP address may be connected to.
    """
    if urlsplit(url).scheme == "https":
        return _post(url, {"text": text, **about}, allows)
    try:
        plugin = _plugin(url)
    except Conflict as error:
        return str(error)
    is_sent = plugin is not None and plugin.notify(body=text)
    return None if is_sent else "apprise could not send it; the product did not accept it, or did not answer"


def _post(url: str, message: dict[str, Any], allows: Callable[[str], bool]) -> str | None:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return f"{host} is not known"
    if not all(map(allows, found)):
        return f"{host} is no address of the Internet"
    place = httpx.URL(url).copy_with(host=min(found, key=lambda each: ":" in each))
    headers = {"Host": parts.netloc, "Content-Type": "application/json", "User-Agent": "moedisco"}
    named = {"sni_hostname": host}
    try:
        with (
            _client() as client,
            client.stream(
                "POST", place, content=json.dumps(message).encode(), headers=headers, extensions=named
            ) as answer,
        ):
            return None if answer.is_success else f"status {answer.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"no answer ({type(error).__name__})"


def _client() -> httpx.Client:
    # The environment's proxies would look the host up again.
    return httpx.Client(timeout=TIMEOUT, trust_env=False)


def _plugin(url: str) -> Any:
    """Apprise's object for a URL; None if apprise does not read it."""
    try:
        apprise = importlib.import_module("apprise")
    except ImportError as error:
        raise Conflict(f"{urlsplit(url).scheme}:// {_MISSING}") from error
    return apprise.Apprise.instantiate(url, asset=apprise.AppriseAsset(http_redirects=False), suppress_exceptions=True)
