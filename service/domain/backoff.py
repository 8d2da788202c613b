"""When to try again."""

from __future__ import annotations

FIRST_SECONDS = 5.0
MOST_SECONDS = 3600.0
GIVE_UP_SECONDS = 24 * 3600.0


def delay(attempts: int, fraction: float) -> float:
    """Seconds to wait after so many failed attempts: twice as long each time, up to an hour.

    Args:
        attempts: At least 1.
        fraction: From 0 to 1, at random: spreads those that failed together over the second half of the wait.
    """
    whole = min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** min(attempts - 1, 60))
    return whole * (1 + fraction) / 2


def next_try(created: float, attempts: int, now: float, fraction: float) -> float | None:
    """When to try again what has been due since `created`; None: a day of trying is enough.

    The last attempt is made when the day is over, whatever the delay would be.
    """
    end = created + GIVE_UP_SECONDS
    return None if now >= end else min(end, now + delay(attempts, fraction))
