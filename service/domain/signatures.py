"""Driver tokens and webhook signatures: HMAC-SHA256 with a shared secret."""

from __future__ import annotations

import base64
import hashlib
import hmac

from service.domain.jobs import submission_id

SIGNATURE_HEADER = "X-MoeDisco-Signature"
DRIVER_TOKEN_PREFIX = "mdr_"  # noqa: S105 - the recognisable beginning of a token, not one


def driver_token(secret: bytes, run_id: str, attempt: int) -> str:
    """Token with which the driver of an attempt authenticates its reports.

    The token is the same for every submission of the attempt, so that a submission can be repeated. No other attempt can use it.

    Args:
        secret: Secret of the service.
        run_id: Id of the run.
        attempt: Attempt of the run, from 1.
    """
    digest = hmac.digest(secret, f"driver {submission_id(run_id, attempt)}".encode(), hashlib.sha256)
    return DRIVER_TOKEN_PREFIX + base64.urlsafe_b64encode(digest).decode().rstrip("=")


def sign(secret: str, body: bytes, now: float) -> str:
    """Signature header of a webhook delivery, `t=TIME,v1=HEX`, where HEX signs TIME, a dot and the body."""
    digest = hmac.new(secret.encode(), f"{int(now)}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={int(now)},v1={digest}"
