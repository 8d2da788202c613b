from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_account import Attempt, attempts, check_losses, lost

from moedisco_ray.core.records.events import Event

# Steps that an attempt makes, and how many of them are lost with it.
ENDS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=4)


def told(unit: str, start: int, end: int) -> list[Event]:
    steps = [Event("progress", "submodels", unit, {"step": step}) for step in range(start + 1, end + 1)]
    return [Event("unit_started", "submodels", unit), *steps]


@given(ENDS, st.integers(1, 12))
def test_what_losses_took_is_what_was_trained_beyond_the_plan(ends: list[tuple[int, int]], rest: int) -> None:
    events: list[Event] = []
    start, losses = 0, []
    for made, gone in ends:
        events += told("a", start, start + made)
        losses.append(min(made, gone))
        start += made - losses[-1]
    planned = start + rest
    events += told("a", start, planned)
    found = attempts(events)["a"]
    assert lost(found) == losses
    assert all(attempt.in_a_row for attempt in found)
    assert sum(len(attempt.reported) for attempt in found) == planned + sum(losses)


def test_two_trainers_of_one_unit_are_seen() -> None:
    first, second = told("a", 0, 4), told("a", 2, 6)
    mixed = [*first[:3], second[0], second[1], first[3], *second[2:]]
    assert not all(attempt.in_a_row for attempt in attempts(mixed)["a"])


def test_an_attempt_that_made_no_step_is_none() -> None:
    events = [*told("a", 0, 3), Event("unit_started", "submodels", "a"), *told("a", 3, 5)]
    assert attempts(events)["a"] == [Attempt(0, [1, 2, 3]), Attempt(3, [4, 5])]


@given(st.integers(0, 9), st.integers(1, 12), st.data())
def test_safe_is_the_newest_checkpoint_that_an_attempt_told_of(start: int, made: int, data: st.DataObject) -> None:
    steps = range(start + 1, start + made + 1)
    saved = sorted(data.draw(st.sets(st.sampled_from(steps))))
    first, *rest = told("a", start, start + made)
    checkpoints = [Event("checkpoint", "submodels", "a", {"step": step}) for step in saved]
    [attempt] = attempts([first, *rest, *checkpoints])["a"]
    assert attempt.safe == max(saved, default=start)
    # The next attempt continues from what is safe, or from a checkpoint that was no longer reported.
    again = data.draw(st.integers(attempt.safe, attempt.end))
    both = attempts([first, *rest, *checkpoints, *told("a", again, start + made + 1)])["a"]
    assert lost(both) == [attempt.end - again]
    assert both[1].safe == again


@pytest.mark.parametrize(
    ("end", "saved", "resumed", "on_disk", "allowed"),
    [
        (23, [8, 16], 16, True, True),  # the newest checkpoint is complete
        (17, [8], 8, True, True),  # it was being written: a step more than an interval
        (20, [8], 8, True, True),
        (21, [8], 8, True, False),
        (23, [8], 8, False, True),
        (24, [8], 8, False, False),  # this save waits for the write of the one before
        (23, [8, 16], 8, False, False),
    ],
)  # the next attempt continued from an older one
def test_a_loss_is_an_interval_and_what_was_made_during_a_write(
    end: int, saved: list[int], resumed: int, on_disk: bool, allowed: bool
) -> None:
    unit = [Attempt(0, list(range(1, end + 1)), saved), Attempt(resumed, list(range(resumed + 1, 31)), [24])]
    with contextlib.nullcontext() if allowed else pytest.raises(AssertionError):
        check_losses(unit, 8, on_disk=on_disk)
