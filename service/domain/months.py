"""Calendar months in UTC, by which dollars are limited."""

from __future__ import annotations

from datetime import UTC, datetime


def month_of(time: float) -> str:
    """The month of a moment, such as `2026-11`.

    Args:
        time: Seconds since the epoch.
    """
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m")


def next_month(time: float) -> float:
    """When the month after that of a moment begins, in seconds since the epoch."""
    now = datetime.fromtimestamp(time, UTC)
    year, month = (now.year + 1, 1) if now.month == 12 else (now.year, now.month + 1)
    return datetime(year, month, 1, tzinfo=UTC).timestamp()
