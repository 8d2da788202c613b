"""Secrets of a run: variables of the driver's environment, which a control service gives to it alone."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path

import httpx

from moedisco_ray.core.driver_proofs import (
    NONCE_BYTES,
    PROOF_HEADER,
    ReportAddress,
    is_proven,
    request_headers,
    secrets_place,
)
from moedisco_ray.core.errors import ConfigError, RunError, RunStopped
from moedisco_ray.core.sealed import unseal

PATIENCE = 600.0
"""Time in which the service must give the secrets, in seconds: it may be restarting when a driver starts."""
_PAUSE = 1.0
"""Pause between two requests, in seconds."""
_REQUEST_SECONDS = 30.0


def receive_secrets(path: Path) -> None:
    """Set the variables whose values the service has for this driver; does nothing if the run names none.

    Args:
        path: File with the `ReportAddress`, which the service may replace meanwhile.

    Raises:
        ConfigError: The file cannot be read, or the service has no such secret.
        RunError: The service does not answer.
        RunStopped: Another driver may drive the run now.
    """
    if not _address_in(path).secrets:
        return
    deadline = time.monotonic() + PATIENCE
    while (found := _asked(_address_in(path))) is None:
        if time.monotonic() > deadline:
            raise RunError("the service did not give the run's secrets; start it, and resume the run")
        time.sleep(_PAUSE)
    os.environ.update(found)


def _asked(address: ReportAddress) -> dict[str, str] | None:
    """The secrets by name; None without an answer that the service has signed."""
    nonce = secrets.token_hex(NONCE_BYTES)
    body = json.dumps({"first": 0, "events": [], "secrets": True}).encode()
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    headers |= request_headers(address, nonce, body)
    try:
        answer = httpx.post(address.url, content=body, headers=headers, timeout=_REQUEST_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return None
    proof = answer.headers.get(PROOF_HEADER, "")
    if not is_proven(proof, address.key, nonce, answer.status_code, answer.content):
        return None
    if answer.status_code == httpx.codes.GONE:
        raise RunStopped("superseded")
    if answer.status_code == httpx.codes.CONFLICT:
        raise ConfigError("secrets", ", ".join(address.secrets), answer.json()["detail"])
    if answer.status_code != httpx.codes.OK:
        return None
    found: dict[str, str] = json.loads(unseal(address.key, secrets_place(nonce), answer.json()["secrets"]))
    return {name: found[name] for name in address.secrets}


def _address_in(path: Path) -> ReportAddress:
    """The address of the service in the file that it wrote for this driver.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        return ReportAddress.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = (
            f"cannot be read ({error.strerror}); start drivers as the service's user or as that of its --driver-user"
        )
        raise ConfigError("--report-to", str(path), remedy) from error
    except ValueError as error:
        raise ConfigError(
            "--report-to", str(path), "must be the file that the service writes for the driver"
        ) from error
