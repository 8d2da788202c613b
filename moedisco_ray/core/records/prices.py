"""What slots cost: the one place that looks prices up, and the one that multiplies time by a price.

The event in which workers take slots states the price at that moment, and the hold keeps it until it ends. So everyone
who reads a run's events adds up the same dollars, and a later price never changes what was charged. Events of earlier
versions state no price: the configuration's holds for them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping

from moedisco_ray.core.config import Pools
from moedisco_ray.core.records.events import Event

PRICED_EVENTS = ("workers_held", "slots_free")
"""Events that state the price of the slots that they name."""


@dataclasses.dataclass(frozen=True)
class PriceChange:
    """Prices that hold from a moment on.

    Attributes:
        since: That moment, in seconds since the epoch.
        prices: Dollars per worker-hour, by custom resource; prices of other resources stay.
    """

    since: float
    prices: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class PriceBook:
    """The prices of a run's pools, and how they change.

    Attributes:
        pools: Pools of the run's configuration, with the prices that hold until a change.
        changes: Changes, oldest first.
    """

    pools: Pools
    changes: tuple[PriceChange, ...] = ()

    def at(self, pool: str, moment: float = math.inf) -> float:
        """Dollars per worker-hour of a pool, or of one node type of a mixed pool, at a moment.

        Args:
            pool: `Pool.key`: `low_memory`, `high_memory`, `low_memory.NODE_TYPE` or `owners.NAME`.
            moment: Seconds since the epoch; by default after the last change.

        Raises:
            KeyError: No pool has this name.
        """
        found = self.pools.at(pool)
        prices = (
            change.prices
            for change in reversed(self.changes)
            if change.since <= moment and found.resource in change.prices
        )
        newest = next(prices, None)
        return found.price_per_hour if newest is None else newest[found.resource]

    def changed(self, prices: Mapping[str, float], since: float) -> PriceBook:
        """The book with other prices from a moment on; the same book if these prices hold already.

        Args:
            prices: Dollars per worker-hour, by custom resource.
            since: The moment, in seconds since the epoch.
        """
        if all(self.at(key) == prices.get(pool.resource, self.at(key)) for key, pool in self.pools.by_key.items()):
            return self
        return dataclasses.replace(self, changes=(*self.changes, PriceChange(since, prices)))


class PriceTag:
    """Writes into the events of a running driver what slots cost now.

    Args:
        pools: Pools of the run's configuration.
    """

    def __init__(self, pools: Pools, clock: Callable[[], float] = time.time) -> None:
        self._lock = threading.Lock()
        self._book = PriceBook(pools)
        self._clock = clock

    def change(self, prices: Mapping[str, float]) -> None:
        """Use other prices from now on; slots that workers hold already keep theirs.

        Args:
            prices: Dollars per worker-hour, by custom resource.
        """
        with self._lock:
            self._book = self._book.changed(prices, self._clock())

    def __call__(self, event: Event) -> Event:
        """The event, with a `price_per_hour` if it is one of `PRICED_EVENTS`."""
        if event.type not in PRICED_EVENTS:
            return event
        return dataclasses.replace(
            event, data=event.data | {"price_per_hour": self._book.at(event.data["pool"], event.time)}
        )


def dollars_of(worker_seconds: float, price_per_hour: float) -> float:
    """Dollars for slots that are held.

    Args:
        worker_seconds: Number of slots times seconds.
        price_per_hour: Dollars per worker-hour.
    """
    return worker_seconds / 3600 * price_per_hour
