"""Texts that only those who know a key can read: secrets in the service's database, and on their way to a driver."""

from __future__ import annotations

import base64
import hmac

from cryptography.fernet import Fernet, InvalidToken


def seal(key: bytes, place: str, text: str) -> str:
    """Encrypt and sign a text (Fernet: AES-128-CBC with HMAC-SHA256).

    Args:
        key: Secret of at least 32 random bytes.
        place: Where the text belongs; copied to another place, it cannot be read there.
        text: The text.
    """
    return _cipher(key, place).encrypt(text.encode()).decode()


def unseal(key: bytes, place: str, sealed: str) -> str:
    """Read a text that `seal` has made.

    Raises:
        ValueError: The text was sealed with another key, for another place, or was changed.
    """
    try:
        return _cipher(key, place).decrypt(sealed.encode()).decode()
    except InvalidToken as error:
        raise ValueError("not sealed with this key for this place") from error


def _cipher(key: bytes, place: str) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(hmac.digest(key, place.encode(), "sha256")))
