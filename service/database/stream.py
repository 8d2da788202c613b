"""Event stream of a run: the events of its drivers and of the service, numbered without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from moedisco_ray.core.records.events import Event
from service.database import tables, values
from service.errors import NotFound


def append(session: Session, run: tables.RunRow, events: Sequence[Event], now: float) -> None:
    """Append a driver's events to a run's stream; concurrent writers wait for each other.

    Raises:
        NotFound: The run was deleted.
    """
    # The UPDATE locks the row, so that no other transaction gets these positions.
    end = session.execute(
        update(tables.RunRow)
        .where(tables.RunRow.id == run.id)
        .values(next_position=tables.RunRow.next_position + len(events), updated=now)
        .returning(tables.RunRow.next_position)
        .execution_options(synchronize_session=False)
    ).scalar()
    if end is None:
        raise NotFound(f"run {run.id} was deleted")
    set_committed_value(run, "next_position", end)
    set_committed_value(run, "updated", now)
    put(
        session,
        run.id,
        end - len(events),
        [
            {
                "time": event.time,
                "type": values.text(event.type, 32),
                "stage": None if event.stage is None else values.text(event.stage, 32),
                "unit": None if event.unit is None else values.text(event.unit, 64),
                "data": values.named_document(event.data),
            }
            for event in events
        ],
    )


def put(session: Session, run_id: str, first: int, rows: Sequence[dict[str, Any]]) -> None:
    """Store events at positions that the caller has reserved."""
    if rows:
        placed = [{"run_id": run_id, "position": position, **row} for position, row in enumerate(rows, first)]
        session.execute(insert(tables.EventRow.__table__), placed)  # type: ignore[arg-type]


def read(session: Session, run_id: str, after: int, limit: int) -> list[tables.EventRow]:
    """Read up to `limit` events after a position; -1 reads from the beginning."""
    position = tables.EventRow.position
    return list(
        session.scalars(
            select(tables.EventRow)
            .where(tables.EventRow.run_id == run_id, position > min(after, values.LARGEST))
            .order_by(position)
            .limit(limit)
        )
    )
