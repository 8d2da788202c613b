"""Add the figures that lists of runs show and are sorted by, and the owner's note."""

from __future__ import annotations

import json
import math
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
COLUMNS: dict[str, Any] = {
    "perplexity": sa.Float(),
    "bits_per_byte": sa.Float(),
    "held_out_loss": sa.Float(),
    "active_parameters": WHOLE,
    "tokens": WHOLE,
    "hours": sa.Float(),
    "note": sa.Text(),
}
LARGEST = 2**63 - 1
BATCH = 500
"""Number of rows that are read at once: the documents of a run may be large."""

RUNS = sa.table("runs", *map(sa.column, ("id", "state", "meter", *COLUMNS)))
EVENTS = sa.table("events", *map(sa.column, ("run_id", "position", "type", "stage", "data")))
UNITS = sa.table("units", sa.column("run_id"), sa.column("tokens"))
ENDED = RUNS.c.state.in_(["succeeded", "failed", "cancelled"])


def upgrade() -> None:
    """Add the columns, and fill them from the stored events, units and meters."""
    for name, kind in COLUMNS.items():
        op.add_column("runs", sa.Column(name, kind))
    connection = op.get_bind()
    trained = sa.select(sa.func.sum(UNITS.c.tokens)).where(UNITS.c.run_id == RUNS.c.id)
    connection.execute(sa.update(RUNS).where(ENDED).values(tokens=sa.cast(trained.scalar_subquery(), WHOLE)))
    _fill_figures(connection)
    _fill_hours(connection)
    op.create_index("runs_by_creation", "runs", ["created", "id"])
    op.create_index(
        "runs_by_figures",
        "runs",
        [
            *("owner", "id", "created", "name", "state", "perplexity", "bits_per_byte", "held_out_loss"),
            *("active_parameters", "tokens", "hours"),
        ],
    )


def downgrade() -> None:
    op.drop_index("runs_by_figures", "runs")
    op.drop_index("runs_by_creation", "runs")
    for name in COLUMNS:
        op.drop_column("runs", name)


def _fill_figures(connection: sa.Connection) -> None:
    readers = {"evaluate": _of_evaluation, "export": _of_export}
    data = sa.cast(EVENTS.c.data, sa.Text)
    finished = sa.select(EVENTS.c.run_id, EVENTS.c.stage, data).where(
        EVENTS.c.type == "stage_finished", EVENTS.c.stage.in_(list(readers))
    )
    for run_id, stage, text in connection.execute(finished.order_by(EVENTS.c.run_id, EVENTS.c.position)).all():
        figures = readers[stage](_object(_object(text).get("summary")))
        connection.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(**figures))


def _of_evaluation(summary: dict[str, Any]) -> dict[str, Any]:
    perplexity = _number(summary.get("perplexity"))
    return {
        "perplexity": perplexity,
        "bits_per_byte": _number(summary.get("bits_per_byte")),
        "held_out_loss": math.log(perplexity) if perplexity is not None and perplexity > 0 else None,
    }


def _of_export(summary: dict[str, Any]) -> dict[str, Any]:
    return {"active_parameters": _whole(summary.get("active_parameters"))}


def _fill_hours(connection: sa.Connection) -> None:
    ended = list(connection.scalars(sa.select(RUNS.c.id).where(ENDED)))
    for start in range(0, len(ended), BATCH):
        meters = sa.select(RUNS.c.id, sa.cast(RUNS.c.meter, sa.Text)).where(RUNS.c.id.in_(ended[start : start + BATCH]))
        for run_id, text in connection.execute(meters).all():
            seconds = _number(_object(text).get("elapsed"))  # meters of early versions do not have it
            if seconds:
                connection.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(hours=seconds / 3600))


def _object(value: Any) -> dict[str, Any]:
    """A JSON object, given as such or as text; empty if it is damaged."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST else None
