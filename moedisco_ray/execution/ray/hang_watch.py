"""The driver's watch over trainings whose process is alive and does nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from moedisco_ray.execution.ray.event_mailbox import EventMailbox
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.hanging import SILENT_SECONDS, START_SECONDS
from moedisco_ray.policies.retrying import End

_GAP = 0.25
"""Share of the allowed silence after which a pause between two checks means that the driver itself was stopped."""


class HangWatch:
    """Kills attempts at trainings that hang.

    Args:
        mailbox: Carries the trainers' signs of life; see `pulse`.
        clock: Returns the current time in seconds since the epoch.
    """

    def __init__(self, mailbox: EventMailbox, clock: Callable[[], float] = time.time) -> None:
        self._mailbox = mailbox
        self._clock = clock
        self._reasons: dict[str, str] = {}
        self._checked_at = self._since = clock()

    def check(self, units: Sequence[str]) -> None:
        """Kill the attempts at those of the running units that hang."""
        now = self._clock()
        if now - self._checked_at > _GAP * SILENT_SECONDS:
            self._since = now  # messages that came meanwhile are still unread
        self._checked_at = now
        for unit, status in self._mailbox.statuses(units).items():
            reason = self._hangs(status, now)
            if reason is None:
                self._reasons.pop(unit, None)  # of an attempt that ended with a result in spite of it
            else:
                self._reasons[unit] = reason
                self._mailbox.kill_attempt(unit)

    def end_of(self, unit: str, end: End) -> End:
        """How an attempt ended: if it was killed because it hung, with that reason."""
        reason = self._reasons.pop(unit, None)
        if reason is None or end.kind not in ("died", "failed", "bad_card"):
            return end
        return End("bad_card" if end.kind == "bad_card" else "died", end.step, reason)

    def _hangs(self, status: UnitStatus, now: float) -> str | None:
        """Why a training counts as hung; None if it does not."""
        if status.held_at is None:
            return None
        where = "; its log has the stacks of its threads"
        if status.hung_seconds:
            return f"no step ended for {status.hung_seconds:.0f} s{where}"
        if status.pulse_at is None:
            silent, allowed = now - max(status.held_at, self._since), START_SECONDS
        else:
            silent, allowed = now - max(status.pulse_at, self._since), SILENT_SECONDS
        return f"its process gave no sign of life for {silent:.0f} s" if silent > allowed else None
