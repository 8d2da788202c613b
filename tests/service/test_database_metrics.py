from __future__ import annotations

import math

import pytest
from databases import T0, insert_run
from sqlalchemy import insert

from service.database import metrics
from service.database.tables import Point, UnitRow


def fill(database, run, unit, values, stage="submodels", started=T0):
    with database.write() as session:
        session.add(
            UnitRow(
                run_id=run.id,
                unit=unit,
                stage=stage,
                status="running",
                step=0,
                steps=0,
                tokens=0,
                restarts=0,
                workers=1,
                started=started,
            )
        )
        session.flush()
        session.execute(
            insert(Point),
            [
                {
                    "run_id": run.id,
                    "unit": unit,
                    "step": 3 * at,
                    "tokens": 30 * at,
                    "time": T0,
                    "loss": value,
                    "lr": 0.1,
                }
                for at, value in enumerate(values)
            ],
        )


def read(database, run, figure="loss", units=None, points=100):
    with database.read() as session:
        return metrics.series(session, run.id, figure, units, points)


def test_a_short_curve_is_given_whole(database):
    run = insert_run(database)
    fill(database, run, "seed", [3.0, 2.5, 2.0], stage="seed")
    assert read(database, run) == [metrics.UnitCurve("seed", "seed", [0, 3, 6], [0, 30, 60], [3.0, 2.5, 2.0], 3)]


@pytest.mark.parametrize("count", [5_000, 30_000])
def test_a_long_curve_keeps_its_ends_its_extremes_and_its_spikes(database, count):
    values = [3 + math.sin(at / 500) for at in range(count)]
    values[count // 3], values[count // 2] = 99.0, -99.0
    values[7] = None
    run = insert_run(database)
    fill(database, run, "submodel-0", values)
    [curve] = read(database, run, points=200)
    assert len(curve.values) <= 200
    assert curve.steps == sorted(set(curve.steps))
    assert (curve.steps[0], curve.steps[-1], curve.count) == (0, 3 * (count - 1), count - 1)
    assert [curve.steps[curve.values.index(spike)] for spike in (99.0, -99.0)] == [3 * (count // 3), 3 * (count // 2)]
    assert all(
        curve.values[at] == values[step // 3] and curve.tokens[at] == 10 * step for at, step in enumerate(curve.steps)
    )


def test_curves_come_in_the_order_in_which_their_units_started(database):
    run = insert_run(database)
    for unit, started in (("submodel-1", 2.0), ("submodel-0", 3.0), ("seed", 1.0)):
        fill(database, run, unit, [1.0], started=started)
    assert [curve.unit for curve in read(database, run)] == ["seed", "submodel-1", "submodel-0"]
    assert [curve.unit for curve in read(database, run, units=["submodel-0", "seed", "none", "\x00"])] == [
        "seed",
        "submodel-0",
    ]
    assert read(database, run, figure="grad_norm") == []
    assert [curve.values for curve in read(database, run, figure="lr")] == [[0.1]] * 3


def test_an_unknown_figure_is_refused(database):
    run = insert_run(database)
    with pytest.raises(ValueError, match="figure 'step'"):
        read(database, run, figure="step")
