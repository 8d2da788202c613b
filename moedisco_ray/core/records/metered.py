"""The bill of a run so far, from the usage in its events."""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import Bill, Line, in_order, make_bill
from moedisco_ray.core.records.metering import Meter, Usage
from moedisco_ray.core.records.prices import PriceBook, dollars_of
from moedisco_ray.core.records.ways import with_ways


def metered_bill(meter: Meter, config: RunConfig, quality: str | None = None) -> Bill:
    """The bill of a run so far.

    Args:
        meter: Usage from the run's events.
        config: The run's configuration: pools with prices and speeds.
        quality: What is known of the model's quality at this cost; None if nothing is known.
    """
    book = PriceBook(config.pools)
    idle = [_charged("idle", pool, used, book) for pool, used in meter.idle_charges.items() if used.seconds]
    bill = make_bill(
        metered_lines(meter, book),
        idle=idle,
        seconds=meter.wall_seconds,
        quality=quality,
        planned=False,
        complete=meter.finished,
    )
    return with_ways(bill, meter.ways)


def metered_lines(meter: Meter, book: PriceBook) -> tuple[Line, ...]:
    """Usage and charges of a run so far, one line per stage and pool, in pipeline order.

    Args:
        meter: Usage from the run's events.
        book: Prices for usage whose events state none.
    """
    return in_order(
        _charged(stage, pool, used, book) for stage, pools in meter.charges.items() for pool, used in pools.items()
    )


def _charged(stage: str, pool: str, used: Usage, book: PriceBook) -> Line:
    """A line of metered usage: what was charged, and the book's price for time whose events state none."""
    dollars = used.dollars + dollars_of(used.unpriced, book.at(pool))
    return Line(stage=stage, pool=pool, worker_seconds=used.seconds, dollars=dollars)
