"""Counts of the rows of a slice that hold conversations, completions or token ids."""

from __future__ import annotations

import dataclasses
from typing import Any

_NAMED = 8
"""Maximum number of fields that are named."""


@dataclasses.dataclass
class Tally:
    """Counts of rows.

    Attributes:
        skipped: Rows that could not be read.
        reason: Why the first of them could not be read.
        masked: Rows with a loss mask.
        ended: Rows with a mask that counts a special token, which ends an answer.
        unread: Fields of messages that neither we nor the chat template read.
    """

    skipped: int = 0
    reason: str | None = None
    masked: int = 0
    ended: int = 0
    unread: frozenset[str] = frozenset()

    def skip(self, reason: str) -> None:
        self.skipped += 1
        self.reason = self.reason or reason

    def add(self, other: Tally) -> None:
        self.skipped += other.skipped
        self.reason = self.reason or other.reason
        self.masked += other.masked
        self.ended += other.ended
        self.unread |= other.unread

    def figures(self) -> dict[str, Any]:
        """The figures of a source that a corpus' summary shows."""
        return {"skipped_rows": self.skipped, "skip_reason": self.reason, "unread_fields": sorted(self.unread)[:_NAMED]}
