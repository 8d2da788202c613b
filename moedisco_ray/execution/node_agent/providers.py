"""Which cloud a machine belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moedisco_ray.execution.node_agent.aws import Aws
from moedisco_ray.execution.node_agent.azure import Azure
from moedisco_ray.execution.node_agent.gcp import Gcp
from moedisco_ray.execution.node_agent.metadata import Provider, ProviderName, Service, Unavailable

_ADDRESS = "http://169.254.169.254"

_MAKERS: Mapping[ProviderName, Callable[[Service], Provider]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def make_provider(name: ProviderName, url: str | None = None) -> Provider:
    """The client of a cloud's metadata service.

    Args:
        name: The cloud.
        url: Where the service is; None: where all three clouds have it.
    """
    return _MAKERS[name](Service(url or _ADDRESS))


def find_provider(url: str | None = None) -> Provider | None:
    """The cloud that this machine belongs to; None: none of those, or its service is not up yet."""
    return next((provider for provider in (make_provider(name, url) for name in _MAKERS) if _recognised(provider)), None)


def _recognised(provider: Provider) -> bool:
    try:
        return provider.recognised()
    except Unavailable:
        return False
