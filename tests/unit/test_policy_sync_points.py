from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.policies.sync_points import SyncMembers, ready_members, sync_steps, token_weights


def test_equal_members_sync_every_few_steps_but_not_shortly_before_the_merge() -> None:
    assert sync_steps([12, 12], 4) == [(4, 8), (4, 8)]
    assert sync_steps([10, 14], 4) == [(2, 5, 8), (4, 8, 12)]
    assert sync_steps([10], 3) == [(3, 6)]
    assert sync_steps([5], 4) == [()]


def test_a_shorter_member_syncs_at_the_same_shares() -> None:
    assert sync_steps([100, 50, 33], 25) == [(25, 50, 75), (12, 25, 37), (8, 16, 24)]


@given(steps=st.lists(st.integers(1, 400), min_size=1, max_size=6), every=st.integers(1, 500))
def test_all_have_the_same_number_of_sync_points_between_first_and_last_step(steps: list[int], every: int) -> None:
    found = sync_steps(steps, every)
    assert len({len(at) for at in found}) == 1
    for mine, at in zip(steps, found, strict=True):
        assert all(before < after for before, after in pairwise((0, *at, mine)))
    longest = found[steps.index(max(steps))]
    assert all(after - before >= every for before, after in pairwise((0, *longest)))
    assert all(2 * (max(steps) - last) >= every for last in longest[-1:])


def test_without_patience_a_sync_point_waits_for_all() -> None:
    assert ready_members(["a", "b"], {"a": 0.0}, 1e9, None) is None
    assert ready_members(["a", "b"], {"a": 0.0, "b": 5.0}, 5.0, None) == SyncMembers(("a", "b"))


def test_once_half_have_arrived_the_rest_have_some_time() -> None:
    alive = ["a", "b", "c", "d"]
    assert ready_members(alive, {"a": 0.0}, 1e9, 10.0) is None
    assert ready_members(alive, {"a": 0.0, "c": 7.0}, 16.9, 10.0) is None
    assert ready_members(alive, {"c": 7.0, "a": 0.0}, 17.0, 10.0) == SyncMembers(("a", "c"), ("b", "d"))


def test_a_member_that_was_given_up_does_not_count() -> None:
    assert ready_members(["a"], {"a": 0.0, "b": 1.0}, 1.0, None) == SyncMembers(("a",))
    assert ready_members([], {"b": 1.0}, 1.0, 0.5) is None


@given(tokens=st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
def test_token_weights_are_proportions(tokens: list[int]) -> None:
    found = token_weights(tokens)
    assert sum(found) == pytest.approx(1)
    assert all(share * sum(tokens) == pytest.approx(count) for share, count in zip(found, tokens, strict=True))
