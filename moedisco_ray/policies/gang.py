"""How many workers a gang has: any number between two bounds that divides the global batch, which never changes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which sizes a gang may have. One that is fixed need not divide the batch: its shares are filled up.

    Attributes:
        batch: Sequences per step over all workers.
        fewest: Fewest workers.
        most: Most workers.
    """

    batch: int
    fewest: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether there is a choice."""
        return self.fewest < self.most

    def on(self, slots: int) -> int | None:
        """The largest gang for which so many slots are enough; None: none is."""
        if not self.elastic:
            return self.fewest if slots >= self.fewest else None
        return count_now(slots, self.batch, self.fewest, self.most)

    def asked(self, slots: float, times: int = 0) -> int:
        """The gang to ask nodes for, which come all together or not at all.

        Args:
            slots: How many there may ever be.
            times: How often one was asked for in vain: each time the next smaller one is, down to the smallest.
        """
        within = min(self.most, slots)
        possible = counts(self.batch, self.fewest, int(within)) if self.elastic else ()
        return possible[max(0, len(possible) - 1 - times)] if possible else self.fewest


def counts(batch: int, smallest: int, largest: int) -> tuple[int, ...]:
    """The numbers of workers that a gang may have, ascending: those within the bounds that divide the batch.

    Args:
        batch: Sequences per step over all workers.
        smallest: Fewest workers.
        largest: Most workers.
    """
    return tuple(n for n in range(smallest, min(largest, batch) + 1) if batch % n == 0)


def count_now(available: int, batch: int, smallest: int, largest: int) -> int | None:
    """How many workers to start with.

    Args:
        available: Slots that can be had now, all of them at once.
        batch: Sequences per step over all workers.
        smallest: Fewest workers.
        largest: Most workers.

    Returns:
        The most that fit; None: wait, all or nothing.
    """
    fitting = [n for n in counts(batch, smallest, largest) if n <= available]
    return fitting[-1] if fitting else None


def worth_growing(current: int, possible: int, seconds_left: float, restart_seconds: float) -> bool:
    """Whether more workers save more time than starting again with them takes.

    Args:
        current: Workers now.
        possible: Workers that could be had, by `count_now`.
        seconds_left: Expected with the current ones.
        restart_seconds: From stopping with a checkpoint to the next step.
    """
    return possible > current and seconds_left * (1 - current / possible) > restart_seconds
