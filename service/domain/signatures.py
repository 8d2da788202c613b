"""What proves where a message comes from: HMAC-SHA256 of it under a secret that both sides know."""

from __future__ import annotations

import base64
import hashlib
import hmac

from service.domain.jobs import submission_id

SIGNATURE_HEADER = "X-MoeDisco-Signature"
TOLERANCE_SECONDS = 300.0
DRIVER_TOKEN_PREFIX = "mdr_"  # noqa: S105 - the recognisable beginning of a token, not one


def driver_token(secret: bytes, run_id: str, attempt: int) -> str:
    """What the driver of an attempt reports with.

    The same for every submission of the attempt, so that one whose answer was lost can be repeated; of use for no other.

    Args:
        secret: The service's own.
        run_id: Of which run.
        attempt: Of which of its drivers, from 1.
    """
    digest = hmac.digest(secret, f"driver {submission_id(run_id, attempt)}".encode(), hashlib.sha256)
    return DRIVER_TOKEN_PREFIX + base64.urlsafe_b64encode(digest).decode().rstrip("=")


def sign(secret: str, body: bytes, now: float) -> str:
    """The signature header of a webhook delivery, `t=TIME,v1=HEX`: of TIME, a dot, and the body.

    Args:
        secret: The webhook's.
        body: As it is sent.
        now: Seconds since the epoch.
    """
    return f"t={int(now)},v1={_digest(secret, body, int(now))}"


def verify(secret: str, body: bytes, header: str, now: float, tolerance: float = TOLERANCE_SECONDS) -> bool:
    """What a receiver does with the header: right signature, and not an old message sent again.

    Args:
        secret: The webhook's.
        body: As it arrived.
        header: As it arrived.
        now: Seconds since the epoch.
        tolerance: Seconds that clocks and the journey may differ.
    """
    parts = dict(part.partition("=")[::2] for part in header.split(","))
    time, given = parts.get("t", ""), parts.get("v1", "")
    if not (time.isascii() and time.isdigit() and len(time) < 16):
        return False
    genuine = hmac.compare_digest(given.encode(), _digest(secret, body, int(time)).encode())
    return genuine and abs(now - int(time)) <= tolerance


def _digest(secret: str, body: bytes, time: int) -> str:
    return hmac.new(secret.encode(), f"{time}.".encode() + body, hashlib.sha256).hexdigest()
