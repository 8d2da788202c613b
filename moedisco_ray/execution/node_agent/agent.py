"""The agent's loop: poll the cloud's metadata service; once it announces the machine's end, drain the Ray nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.execution.clouds import CLOUDS
from moedisco_ray.execution.clouds.metadata import Notice, Provider, Service, Unavailable
from moedisco_ray.execution.node_agent.raylets import RayUnavailable

_ADDRESS = "http://169.254.169.254"
_RETRY_SECONDS = 1.0
"""Maximum pause before a failed drain is tried again, in seconds: the notice may leave only 30 s."""


def make_provider(name: str, url: str | None = None) -> Provider:
    """The client of a cloud's metadata service.

    Args:
        name: Name of the cloud.
        url: Address of the metadata service; by default, the link-local address that clouds use.

    Raises:
        ConfigError: There is no such cloud.
    """
    if name not in CLOUDS:
        raise ConfigError("--provider", name, f"is no cloud; use {', '.join(CLOUDS)} or auto")
    return CLOUDS[name].client(Service(url or _ADDRESS))


def find_provider(url: str | None = None) -> Provider | None:
    """The client of this machine's cloud; None if no metadata service responds, which may change later."""
    providers = (make_provider(name, url) for name in CLOUDS)
    return next(filter(_recognised, providers), None)


def _recognised(provider: Provider) -> bool:
    try:
        return provider.recognised()
    except Unavailable:
        return False


def watch(
    provider: Provider,
    drain: Callable[[Notice], Sequence[str]],
    *,
    interval: float,
    stop: threading.Event,
    log: Callable[[str], None],
    leave_on_risk: bool = False,
) -> None:
    """Poll and drain until stopped, also after a first drain: a Ray node that starts later is drained too.

    Args:
        provider: The cloud's metadata service.
        drain: Drains the Ray nodes that are not drained yet and returns their ids; raises `RayUnavailable` to be called
            again.
        interval: Seconds between two polls.
        stop: Ends the watch, after at most one interval.
        log: Receives one line per change of state.
        leave_on_risk: Also drain when the cloud only announces an elevated risk.
    """
    last = ""

    def log_change(line: str) -> None:
        nonlocal last
        if line != last:
            log(line)
        last = line

    log_change(f"watching {provider.name} every {interval:g} s")
    while not stop.is_set():
        began = time.monotonic()
        pause = interval
        try:
            notice = provider.poll(interval)
            if notice is None:
                log_change("nothing is announced")
            elif notice.kind == "risk" and not leave_on_risk:
                log_change(f"{notice.reason}; nothing is done about it")
            else:
                for node in drain(notice):
                    log_change(f"{notice.reason}, in {notice.deadline - time.time():.0f} s: drained Ray node {node}")
        except Unavailable as error:
            log_change(f"no answer from the metadata service: {error}")
        except RayUnavailable as error:
            log_change(f"not drained yet: {error}")
            pause = min(interval, _RETRY_SECONDS)
        stop.wait(max(0.0, pause - (time.monotonic() - began)))
