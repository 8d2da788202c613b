"""What stays of a run while no driver works on it: the trainings on seats, for as long as a next driver may come.

Each process ends by itself: the mailbox when no driver comes, and a seat when its mailbox has ended. A process that
stayed would keep a slot that is paid for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

LEASE_SECONDS = 600.0
"""Seconds for which a training runs on without a driver: a new attempt at a job, with its back-off, or a person who
starts the same command again, takes minutes."""
GONE_SECONDS = 90.0
"""Seconds without a message after which a driver counts as gone. It sends one every second, but its machine may
swap."""
STOPPED_SECONDS = 15.0
"""Seconds after which the driver of a run that was asked to end counts as gone: its seats are to end in any case."""
SAVE_SECONDS = 120.0
"""Maximum seconds for the checkpoint of a training that must end."""
SILENT_SECONDS = GONE_SECONDS + LEASE_SECONDS + SAVE_SECONDS
"""Seconds without an answer after which a mailbox counts as ended even if Ray does not say so: no lease is longer."""
_MOST_BETWEEN = 25.0
"""Maximum seconds between two looks that count as silence. A mailbox looks every second, and a seat that gets no answer
every 20; a process that did not was stopped itself, or its machine slept, and messages may wait for it."""


class Silence:
    """Measures the time without a sign of life of another process.

    Args:
        clock: Returns the current time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.end()

    def end(self) -> None:
        """Note a sign of life."""
        self._silent, self._looked_at = 0.0, self._clock()

    def seconds(self) -> float:
        """Seconds since the last sign of life; of a pause between two calls of this method, 25 s count."""
        now = self._clock()
        self._silent += min(now - self._looked_at, _MOST_BETWEEN)
        self._looked_at = now
        return self._silent


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays now.

    Attributes:
        asks_to_end: Whether the trainings are asked to end with a checkpoint.
        trainings: Whether the seats that train stay.
        others: Whether the other seats stay.
        mailbox: Whether the process that decides stays.
    """

    asks_to_end: bool = False
    trainings: bool = True
    others: bool = True
    mailbox: bool = True


def kept(unseen: float, ending: float | None, *, stopped: bool, training: bool) -> Kept:
    """What stays of a run.

    Args:
        unseen: Seconds since a driver was last seen.
        ending: Seconds since the trainings were asked to end; None if they were not.
        stopped: Whether the run was asked to end.
        training: Whether a seat trains.
    """
    if unseen <= (STOPPED_SECONDS if stopped else GONE_SECONDS):
        return Kept()
    over = ending is not None or stopped or unseen > LEASE_SECONDS
    trainings = training and (not over or ending is None or ending <= SAVE_SECONDS)
    return Kept(asks_to_end=over, trainings=trainings, others=False, mailbox=not over or trainings)


def seat_stays(silent: float, ended: float | None, *, works: bool) -> bool:
    """Whether a seat stays whose mailbox does not answer.

    Args:
        silent: Seconds since the mailbox last answered.
        ended: Seconds since Ray said that the mailbox has ended; None if it did not. Trainings then end with a
            checkpoint.
        works: Whether a function runs on the seat.
    """
    return silent <= SILENT_SECONDS if ended is None else works and ended <= SAVE_SECONDS
