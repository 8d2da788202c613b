"""States that earlier versions of the service wrote, from `tests/states`, put where a test can open them."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

STATES = Path(__file__).parent.parent / "states"
RUNS = {
    "succeeded": "01M8Q085FDC6JGHQ5BTSHSWVNA",
    "failed": "01M8Q086R1CCCRXTBA6DJQ19ZB",
    "cancelled": "01M8Q086RVE0B6QJ4PHYE0QVX7",
    "running": "01M8Q086SQANGFFETRPFTJC8D8",
    "stopping": "01M8Q086TFE2Y09M51A4HCFCJF",
    "starting": "01M8Q086V86HW02QNXQBPAVRJK",
    "queued": "01M8Q086VG6JNAM4ZARQ7ACGGM",
}
"""Runs of the state `a624334`, by their state."""


def put_state(name: str, home: Path) -> None:
    """Write a state's database to `home/state` and its runs to `home/runs`."""
    (home / "state").mkdir(parents=True)
    dump = (STATES / name / "service.sql").read_text(encoding="utf-8").replace("@ROOT@", str(home))
    with contextlib.closing(sqlite3.connect(home / "state" / "service.sqlite3")) as database:
        database.executescript(dump)
    shutil.copytree(STATES / name / "runs", home / "runs")
    for path in (home / "runs").rglob("*"):
        if path.is_file():
            path.write_text(path.read_text(encoding="utf-8").replace("@ROOT@", str(home)), encoding="utf-8")
