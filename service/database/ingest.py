"""Stores what a driver reports, each line once even if it arrives repeatedly."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from moedisco_ray.core.config import Pools
from moedisco_ray.core.records.bill import sum_dollars
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metered import metered_lines
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.prices import PRICED_EVENTS, PriceBook
from service.database import policies, quotas, reuse, runs, stream, values
from service.database.fold import Fold, meterable
from service.database.tables import HeldOutPoint, Point, RunRow, UnitRow
from service.domain.outcome import AWAITED
from service.errors import NotFound

_HIGHEST_PRICE = 1e6
"""Price above which a driver is not believed (dollars per worker-hour)."""


def take(session: Session, run: RunRow, first: int, events: Sequence[Event], now: float) -> int:
    """Store consecutive lines of a run's `events.jsonl`.

    Lines that are already stored are skipped; lines after a gap are left for the next report. The run's version changes
    only when a driver begins or ends, because decisions depend on that and not on every step.

    Args:
        session: Writing transaction.
        run: Row of this session, which is updated.
        first: Number of the first line, from 0.
        events: The lines.
        now: Seconds since the epoch.

    Returns:
        The number of the next line that the service needs.

    Raises:
        NotFound: The run was deleted.
        UnusableRun: This version cannot read the run's documents, so that it cannot be metered.
    """
    row = runs.lock(session, run.id)
    if row is None:
        raise NotFound(f"run {run.id} was deleted")
    expected = row.next_seq
    fresh = events[expected - first :] if first <= expected else ()
    if not fresh:
        return expected
    row.check_readable()
    pools = row.pools
    units = {unit.unit: unit for unit in session.scalars(select(UnitRow).where(UnitRow.run_id == row.id))}
    fold, meter = Fold(row.id, row.progress, units), row.usage
    prices = policies.of(session, row.owner).prices
    fresh = [_priced(event, pools, prices) for event in fresh]
    for event in fresh:
        fold.update(event)
        if meterable(event, pools.by_key):
            meter.update(event)
    stream.append(session, row, fresh, now)
    session.add_all(fold.made)
    reuse.take(session, row.id, fold.taken, now)
    _store_points(session, row.id, fold)
    spent = _charge(row, meter, pools)
    if spent > 0:
        quotas.add_dollars(session, row.owner, row.project, spent, now)
    row.next_seq = expected + len(fresh)
    row.progress, row.mark = fold.progress, max(row.mark, fold.mark)
    for name, figure in fold.results.items():
        setattr(row, name, figure)
    if fold.decisive:
        row.version += 1
    session.flush()
    return row.next_seq


def rewind(session: Session, run: RunRow, begin: int) -> None:
    """On an attempt's first report, continue at the driver's first line, even if its number was used before.

    A driver on a new machine continues the log that it finds at the run's URI, which may lack the newest lines that
    were reported.

    Args:
        session: Writing transaction.
        run: Row of this session, which is updated.
        begin: Number of the new driver's first line.
    """
    ended = run.progress.get("ended") or {}
    if ended.get("type") == AWAITED and "begin" not in ended:
        run.next_seq = min(run.next_seq, begin)
        run.progress = run.progress | {"ended": ended | {"begin": begin}}
        session.flush()


def _store_points(session: Session, run_id: str, fold: Fold) -> None:
    _replace(session, Point, run_id, fold.points, fold.rewound)
    first = {unit: measured[0]["step"] for unit, measured in fold.held_out.items()}
    _replace(session, HeldOutPoint, run_id, fold.held_out, first)


def _replace(
    session: Session,
    table: type[Point | HeldOutPoint],
    run_id: str,
    rows: Mapping[str, list[dict[str, Any]]],
    first: Mapping[str, int],
) -> None:
    """Store new rows of units, in place of those that are stored from the step `first` of the unit on."""
    if not rows:
        return
    of_run = table.run_id == run_id
    stored = session.execute(
        select(table.unit, func.max(table.step)).where(of_run, table.unit.in_(list(rows))).group_by(table.unit)
    )
    for unit, last in stored.all():
        if last >= first[unit]:
            session.execute(delete(table).where(of_run, table.unit == unit, table.step >= first[unit]))
    made = list(itertools.chain.from_iterable(rows.values()))
    session.execute(insert(table.__table__), made)  # type: ignore[arg-type]


def _priced(event: Event, pools: Pools, prices: Mapping[str, float]) -> Event:
    """The event of a driver, with a price that can be true.

    A driver states the last price that it knows. A price below both the one at submission and the present one is not
    believed: the present one replaces it.

    Args:
        event: The event.
        pools: Pools of the run's configuration, with the prices at submission.
        prices: The operator's present prices for the run's owner, by custom resource.
    """
    pool, by_key = event.data.get("pool"), pools.by_key
    if (
        event.type not in PRICED_EVENTS
        or "price_per_hour" not in event.data
        or not isinstance(pool, str)
        or pool not in by_key
    ):
        return event
    found = by_key[pool]
    present = prices.get(found.resource, found.price_per_hour)
    stated = values.number(event.data["price_per_hour"])
    if stated is not None and min(present, found.price_per_hour) <= stated <= _HIGHEST_PRICE:
        return event
    return dataclasses.replace(event, data=event.data | {"price_per_hour": present})


def _charge(row: RunRow, meter: Meter, pools: Pools) -> float:
    """Store the meter and what it has charged so far; returns the dollars that this adds."""
    dollars = sum_dollars(metered_lines(meter, PriceBook(pools))) or 0.0
    spent = dollars - row.dollars
    row.dollars, row.worker_seconds, row.meter = dollars, meter.worker_seconds, meter.to_dict()
    return spent
