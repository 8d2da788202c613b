"""Keys of drivers and signatures of messages: HMAC-SHA256 with a secret of the service."""

from __future__ import annotations

import hashlib
import hmac

from service.domain.jobs import submission_id

SIGNATURE_HEADER = "X-MoeDisco-Signature"


def driver_key(secret: bytes, run_id: str, attempt: int) -> bytes:
    """Key with which the driver of an attempt and the service sign reports and their answers.

    The key is the same for every submission of the attempt, so that a submission can be repeated. Every attempt has its
    own.

    Args:
        secret: Secret of the service.
        run_id: Id of the run.
        attempt: Attempt of the run, from 1.
    """
    return hmac.digest(secret, f"driver {submission_id(run_id, attempt)}".encode(), hashlib.sha256)


def sign(secret: str, body: bytes, now: float) -> str:
    """Signature header of a message, `t=TIME,v1=HEX`, where HEX signs TIME, a dot and the body."""
    digest = hmac.new(secret.encode(), f"{int(now)}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={int(now)},v1={digest}"
