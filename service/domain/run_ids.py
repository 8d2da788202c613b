"""What the id of a run looks like: a ULID, 26 digits of Crockford's base 32."""

from __future__ import annotations

import re

DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
LENGTH = 26
PATTERN = f"[0-7][{DIGITS}]{{{LENGTH - 1}}}"
"""As a regular expression."""

_WHOLE = re.compile(PATTERN)


def is_id(text: str) -> bool:
    """Whether a text has the form of an id; nothing else need be looked up."""
    return _WHOLE.fullmatch(text) is not None
