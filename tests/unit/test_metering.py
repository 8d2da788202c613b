from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter


def idle_seconds(meter: Meter) -> dict[str, float]:
    return {pool: used.seconds for pool, used in meter.idle_charges.items()}


def fold(*events: Event) -> Meter:
    meter = Meter()
    for event in events:
        meter.update(event)
    return meter


def held(hold: str, pool: str, workers: int, time: float) -> Event:
    return Event("workers_held", data={"hold": hold, "pool": pool, "workers": workers}, time=time)


def released(hold: str, time: float) -> Event:
    return Event("workers_released", data={"hold": hold}, time=time)


def test_workers_are_charged_from_held_to_released() -> None:
    meter = fold(held("a", "low_memory", 1, 10), held("b", "high_memory", 8, 12), released("b", 14), released("a", 20))
    assert meter.worker_seconds == {"low_memory": 10, "high_memory": 16}


def test_what_was_counted_is_not_taken_back_by_an_end_that_arrives_late() -> None:
    meter = fold(held("a", "low_memory", 1, 10), Event("heartbeat", time=20))
    assert meter.worker_seconds == {"low_memory": 10}
    meter.update(released("a", 19))
    assert meter.worker_seconds == {"low_memory": 10}


def test_a_hold_under_way_counts_up_to_the_last_sign_of_life() -> None:
    meter = fold(held("a", "low_memory", 2, 10), Event("heartbeat", time=15))
    assert meter.worker_seconds == {"low_memory": 10}
    meter.update(Event("heartbeat", time=20))
    assert meter.worker_seconds == {"low_memory": 20}


@pytest.mark.parametrize("end", ["run_started", "run_finished", "run_failed", "run_stopped"])
def test_nothing_is_charged_once_the_driver_has_ended(end: str) -> None:
    last_words = Event(end, time=100 if end == "run_started" else 15)  # the next driver comes when it comes
    meter = fold(held("a", "low_memory", 1, 10), Event("heartbeat", time=15), last_words, Event("heartbeat", time=200))
    assert meter.worker_seconds == {"low_memory": 5}


def test_an_attempt_that_finds_all_made_adds_no_seconds() -> None:
    made = fold(
        Event("run_started", time=10), Event("stage_started", "corpus", time=12), Event("run_finished", time=20)
    )
    assert made.wall_seconds == 10
    visit = Event("run_started", time=100), Event("stage_skipped", "corpus", time=101), Event("run_finished", time=102)
    for event in visit:
        made.update(event)
    assert made.wall_seconds == 10


pools = st.sampled_from(["low_memory", "high_memory"])
holds = st.lists(st.tuples(pools, st.integers(1, 8), st.integers(0, 1000), st.integers(0, 1000)), max_size=8)


@given(holds)
def test_the_total_is_the_sum_over_holds_and_survives_json(spans: list[tuple[str, int, int, int]]) -> None:
    events = []
    expected: dict[str, float] = {}
    for i, (pool, workers, start, length) in enumerate(spans):
        events += [held(str(i), pool, workers, start), released(str(i), start + length)]
        expected[pool] = expected.get(pool, 0) + workers * length
    meter = Meter()
    for event in sorted(events, key=lambda event: (event.time, event.type)):
        meter.update(event)
        meter = Meter.from_dict(json.loads(json.dumps(meter.to_dict())))
    assert {pool: seconds for pool, seconds in meter.worker_seconds.items() if seconds} == {
        pool: seconds for pool, seconds in expected.items() if seconds
    }
    assert not meter.open


def free(pool: str, slots: int, time: float) -> Event:
    return Event("slots_free", data={"pool": pool, "slots": slots}, time=time)


def test_slots_that_nobody_holds_idle_up_to_the_last_sign_of_life() -> None:
    meter = fold(
        free("low_memory", 2, 10), free("low_memory", 1, 15), free("high_memory", 3, 16), Event("heartbeat", time=20)
    )
    assert idle_seconds(meter) == {"low_memory": 10 + 5, "high_memory": 12}
    assert meter.worker_seconds == {}


def test_a_worker_whose_clock_is_ahead_makes_nothing_idle() -> None:
    ahead = Event("progress", time=70)
    later = free("low_memory", 2, 20), free("low_memory", 0, 30), Event("heartbeat", time=80)
    meter = fold(free("low_memory", 1, 10), ahead, *later)
    assert idle_seconds(meter) == {"low_memory": 10 + 20}


@pytest.mark.parametrize("end", ["run_started", "run_finished", "run_failed", "run_stopped"])
def test_nothing_idles_once_the_driver_has_ended(end: str) -> None:
    last_words = Event(end, time=100 if end == "run_started" else 15)
    meter = fold(free("low_memory", 1, 10), Event("heartbeat", time=15), last_words, Event("heartbeat", time=200))
    assert idle_seconds(meter) == {"low_memory": 5}


looks = st.lists(st.tuples(pools, st.integers(0, 4), st.integers(0, 50)), max_size=12)


@given(looks)
def test_idle_time_is_the_sum_over_seconds_of_what_was_free(changes: list[tuple[str, int, int]]) -> None:
    now, events, level = 0, [], {"low_memory": 0, "high_memory": 0}
    expected = {"low_memory": 0, "high_memory": 0}
    for pool, slots, later in changes:
        for each in expected:
            expected[each] += level[each] * later
        now += later
        level[pool] = slots
        events.append(free(pool, slots, now))
    meter = Meter()
    for event in events:
        meter.update(event)
        meter = Meter.from_dict(json.loads(json.dumps(meter.to_dict())))
    assert {pool: seconds for pool, seconds in idle_seconds(meter).items() if seconds} == {
        pool: seconds for pool, seconds in expected.items() if seconds
    }
