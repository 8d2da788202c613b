"""Tags of a run."""

from __future__ import annotations

from collections.abc import Mapping

from moedisco_ray.core.config import MOST_TAGS
from service.errors import InvalidRequest


def patched(tags: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Tags after a merge patch (RFC 7396): a text sets a tag, None removes it, and the other tags stay.

    Raises:
        InvalidRequest: There are too many tags afterwards.
    """
    both = {**tags, **changes}
    found = {key: value for key, value in both.items() if value is not None}
    if len(found) > MOST_TAGS:
        raise InvalidRequest([("tags", f"would be {len(found)}, more than {MOST_TAGS}; remove some with null")])
    return found
