"""Typed clients of the service: `Client` blocks, `AsyncClient` is for asyncio programs."""

from service.client.address import (
    URL_VARIABLE,
    Address,
    address_file,
    changed_since_last_use,
    find_address,
    load_address,
    save_address,
)
from service.client.asynchronous import AsyncClient
from service.client.blocking import Client
from service.client.errors import DownloadError, RequestRefused, ServiceAway, ServiceProblem
from service.client.http import RetryPolicy

__all__ = [
    "URL_VARIABLE",
    "Address",
    "AsyncClient",
    "Client",
    "DownloadError",
    "RequestRefused",
    "RetryPolicy",
    "ServiceAway",
    "ServiceProblem",
    "address_file",
    "changed_since_last_use",
    "find_address",
    "load_address",
    "save_address",
]
