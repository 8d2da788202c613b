"""The number of workers of a gang: any number between two bounds that divides the global batch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Allowed sizes of a gang. A fixed size need not divide the batch; workers' shares are then padded.

    Attributes:
        batch: Sequences per step over all workers.
        fewest: Minimum number of workers.
        most: Maximum number of workers.
    """

    batch: int
    fewest: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether the gang may have more than one size."""
        return self.fewest < self.most

    def on(self, slots: int) -> int | None:
        """The largest gang that fits the number of slots; None if none fits."""
        if not self.elastic:
            return self.fewest if slots >= self.fewest else None
        return count_now(slots, self.batch, self.fewest, self.most)

    def asked(self, slots: float, times: int = 0) -> int:
        """The size of the gang for which nodes are requested; the nodes of one request arrive together or not at all.

        Args:
            slots: Maximum number of slots that the Ray cluster can have.
            times: Number of failed requests so far. Each of them lowers the size to the next smaller allowed one.
        """
        within = min(self.most, slots)
        possible = counts(self.batch, self.fewest, int(within)) if self.elastic else ()
        return possible[max(0, len(possible) - 1 - times)] if possible else self.fewest


def counts(batch: int, smallest: int, largest: int) -> tuple[int, ...]:
    """The allowed numbers of workers, ascending: those within the bounds that divide the batch.

    Args:
        batch: Sequences per step over all workers.
        smallest: Minimum number of workers.
        largest: Maximum number of workers.
    """
    return tuple(n for n in range(smallest, min(largest, batch) + 1) if batch % n == 0)


def count_now(available: int, batch: int, smallest: int, largest: int) -> int | None:
    """The number of workers to start with.

    Args:
        available: Number of free slots.
        batch: Sequences per step over all workers.
        smallest: Minimum number of workers.
        largest: Maximum number of workers.

    Returns:
        The largest allowed number; None if the free slots do not suffice, so that the gang must wait.
    """
    fitting = [n for n in counts(batch, smallest, largest) if n <= available]
    return fitting[-1] if fitting else None


def worth_growing(current: int, possible: int, seconds_left: float, restart_seconds: float) -> bool:
    """Whether more workers save more time than the restart takes.

    Args:
        current: Current number of workers.
        possible: Possible number of workers (`count_now`).
        seconds_left: Remaining seconds of training with the current workers.
        restart_seconds: Seconds from the end of the last step, through the checkpoint and the restart, to the next
            step.
    """
    return possible > current and seconds_left * (1 - current / possible) > restart_seconds
