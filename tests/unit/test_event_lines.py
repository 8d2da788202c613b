"""A damaged line of `events.jsonl` is lost: it changes no cost, and later lines keep their numbers."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from test_damaged_runs import change_digit

from moedisco_ray.cli.reporter import Spool
from moedisco_ray.core.records.event_totals import EventTotals
from moedisco_ray.core.records.events import LOST, Event, EventLog, events_in, without_damage

_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=8) | st.just(',"crc":"'),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.dictionaries(st.text(max_size=6), _values, max_size=3), flip=st.integers(0, 10**9))
def test_one_flipped_bit_leaves_no_other_event(data: dict[str, object], flip: int) -> None:
    event = Event("progress", "seed", "seed", data, 1.5)
    content = bytearray(f"{event.line}\n".encode())
    assert repr(list(events_in([bytes(content)]))) == repr([event])
    place = flip % (8 * (len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    assert set(map(repr, events_in(bytes(content).splitlines(keepends=True)))) <= {repr(LOST)}
    assert len(without_damage(bytes(content))) == len(content)


def written(path: Path) -> Path:
    """A worker held a slot for 1,800 s."""
    log = EventLog(path)
    log(Event("workers_held", "seed", data={"hold": "h", "pool": "p", "workers": 1}, time=1000.0))
    log(Event("progress", "seed", "seed", {"step": 1, "tokens": 8, "loss": 3.5}, time=1900.0))
    log(Event("workers_released", "seed", data={"hold": "h"}, time=2800.0))
    log.close()
    return path


def seconds(path: Path) -> float:
    """Worker-seconds that the report charges."""
    return sum(EventTotals(EventLog.read(path)).meter.worker_seconds.values())


def test_a_changed_time_is_not_charged(tmp_path: Path) -> None:
    """The end of the hold is lost, so that it is charged up to the newest event.

    Before (af276e38): the report charged 1,100 s, up to the changed time.
    """
    path = written(tmp_path / "events.jsonl")
    assert seconds(path) == 1800
    change_digit(path, '"time":2')
    assert seconds(path) == 900


def test_a_changed_key_stops_no_run(tmp_path: Path) -> None:
    """Before (af276e38): the report, and so each later attempt of the run, ended with KeyError: 'step'."""
    path = written(tmp_path / "events.jsonl")
    path.write_text(path.read_text().replace('"step"', '"sTep"'))
    assert seconds(path) == 1800


def test_the_lines_after_a_damaged_one_keep_their_numbers(tmp_path: Path) -> None:
    """The service has the first two lines, and wants the third.

    Before (af276e38): with a line that a flipped bit made unreadable, it never got the third one.
    """
    path = written(tmp_path / "events.jsonl")
    path.write_text(path.read_text().replace('"step":1', '"step";1'))
    assert [event["type"] for event in Spool(path).read(2, 9)] == ["workers_released"]
    assert [event.type for event in EventLog.read(path)] == ["workers_held", "workers_released"]


def test_what_a_kill_left_of_a_line_has_no_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"type":"progress","sta')
    written(path)
    assert [event["type"] for event in Spool(path).read(0, 9)] == ["workers_held", "progress", "workers_released"]
    assert without_damage(path.read_bytes()) == path.read_bytes()
