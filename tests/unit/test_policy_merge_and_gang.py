"""Quorum, arrival, gang and placement."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.policies import arrival, gang, placement, quorum
from moedisco_ray.policies.placement import Need, NodeType
from moedisco_ray.policies.quorum import Member

members = st.lists(
    st.builds(
        Member,
        st.uuids().map(str),
        st.sampled_from(["finished", "training", "given_up"]),
        st.floats(1, 1000),
        st.floats(1, 1000),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=12,
)


@given(members, st.integers(1, 12), st.floats(0, 1e5))
def test_a_quorum_waits_fails_or_goes_on_by_what_can_still_come(
    given_members: list[Member], k: int, now: float
) -> None:
    finished = sum(member.state == "finished" for member in given_members)
    possible = finished + sum(member.state == "training" for member in given_members)
    verdict = quorum.decide(given_members, k, now)
    assert (verdict.action == "fail") == (possible < k)
    if verdict.action == "go":
        assert finished >= k
    if finished >= k:
        # Waiting ends: at the moment that is named, it goes on.
        assert quorum.decide(given_members, k, now + verdict.seconds * (1 + 1e-9) + 1e-6).action == "go"


@given(members)
def test_each_member_contributes_the_best_it_has(given_members: list[Member]) -> None:
    contributions = quorum.decide(given_members, None, 0.0).contributions
    for member in given_members:
        expected = "finished" if member.state == "finished" else "checkpoint" if member.checkpoint else "seed"
        assert contributions[member.name] == expected


def test_the_rest_have_their_time() -> None:
    some = [
        Member("a", "finished", 100.0),
        Member("b", "finished", 200.0),
        Member("c", "training", expected=180.0, checkpoint=4),
    ]
    waits = quorum.decide(some, 2, 250.0)
    assert (waits.action, waits.seconds) == ("wait", 50.0)
    assert quorum.decide(some, 2, 300.0).action == "go"
    # One that is longer than all the others is given its own time.
    longer = [*some[:2], Member("c", "training", expected=1000.0)]
    assert quorum.decide(longer, 2, 300.0).seconds == 1200.0


def test_without_a_quorum_all_are_waited_for() -> None:
    some = [Member("a", "finished", 1.0), Member("b", "training", expected=1.0)]
    assert quorum.decide(some, None, 1e9).action == "wait"
    assert quorum.decide([some[0], Member("b", "given_up")], None, 1.0).action == "fail"
    assert quorum.decide([some[0]], None, 1.0).action == "go"


def test_nobody_waits_for_those_that_gave_up() -> None:
    verdict = quorum.decide([Member("a", "finished", 5.0), Member("b", "given_up", checkpoint=3)], 1, 5.0)
    assert verdict.action == "go"
    assert verdict.contributions == {"a": "finished", "b": "checkpoint"}


def test_the_end_is_that_of_the_queue() -> None:
    assert arrival.ends_in([10.0, 4.0], [3.0, 3.0], 2) == 10.0
    assert arrival.ends_in([10.0, 4.0], [3.0, 9.0], 2, stretch=1.1) == pytest.approx(17.6)
    assert arrival.ends_in([5.0], [1.0], 0) == math.inf
    assert arrival.ends_in([], [], 0) == 0.0


def test_a_boot_is_what_the_newest_took() -> None:
    assert arrival.boot_seconds([]) == arrival.ASSUMED_BOOT
    assert arrival.boot_seconds([1e6] * 20 + [60.0] * 50) == 60.0
    assert arrival.boot_seconds([10.0, 20.0, 30.0]) == 20.0


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=60), st.integers(1, 64))
def test_a_gang_waits_for_its_slowest_node(measured: list[float], nodes: int) -> None:
    boot = arrival.boot_seconds(measured, nodes)
    assert arrival.boot_seconds(measured) - 1e-6 <= boot <= max(measured) + 1e-6
    assert arrival.boot_seconds(measured, nodes + 1) >= boot - 1e-6


def test_half_of_all_gangs_come_in_the_time_that_is_expected() -> None:
    chance = random.Random(0)
    measured = [chance.lognormvariate(5.5, 0.4) for _ in range(50)]
    boot = arrival.boot_seconds(measured, 8)
    in_time = sum(max(chance.choices(measured, k=8)) <= boot for _ in range(4000)) / 4000
    assert in_time == pytest.approx(0.5, abs=0.1)


@given(st.floats(1, 1e5), st.floats(1, 1e4))
def test_nodes_come_as_the_last_one_ends_and_are_asked_for_once(work: float, boot: float) -> None:
    asked_at = None
    for tick in range(1000):
        left = work * (1 - tick / 1000)
        advice = arrival.advise(left, boot, asked=asked_at is not None)
        assert advice != "release"  # with nothing lost, asking never needs to be taken back
        if advice == "ask":
            assert asked_at is None
            asked_at = left
    if asked_at is None:
        assert boot < work / 1000
    else:
        assert min(work, boot) - work / 1000 - 1e-6 <= asked_at <= boot


@given(st.floats(0, 1e5), st.floats(1, 1e4))
def test_a_type_gives_way_once_it_is_twice_as_late(asked_for: float, boot: float) -> None:
    assert arrival.gives_way(asked_for, boot) == (asked_for > 2 * boot)


def test_nodes_that_would_idle_for_long_are_let_go() -> None:
    assert arrival.advise(550.0, 300.0, asked=True) == "keep"
    assert arrival.advise(601.0, 300.0, asked=True) == "release"
    assert arrival.advise(math.inf, 300.0, asked=True) == "release"
    assert arrival.advise(math.inf, 300.0, asked=False) == "wait"


@given(st.integers(1, 256), st.integers(1, 16), st.integers(0, 32), st.integers(0, 40))
def test_every_count_divides_the_batch_and_the_most_that_fit_is_taken(
    batch: int, least: int, more: int, available: int
) -> None:
    allowed = gang.counts(batch, least, least + more)
    assert all(batch % n == 0 and least <= n <= least + more for n in allowed)
    chosen = gang.count_now(available, batch, least, least + more)
    if chosen is None:
        assert all(n > available for n in allowed)
    else:
        assert chosen == max(n for n in allowed if n <= available)


def test_a_gang_shrinks_to_a_divisor() -> None:
    assert gang.counts(16, 1, 8) == (1, 2, 4, 8)
    assert gang.count_now(7, 16, 1, 8) == 4
    assert gang.count_now(1, 16, 2, 8) is None


@given(st.integers(1, 16), st.integers(1, 16), st.floats(0, 1e5), st.floats(0, 1e4))
def test_growing_must_pay(current: int, possible: int, left: float, restart: float) -> None:
    if gang.worth_growing(current, possible, left, restart):
        assert left * current / possible + restart < left * (1 + 1e-9)


types = st.lists(
    st.builds(
        NodeType, st.uuids().map(str), st.floats(8, 96), st.floats(0.05, 5), st.floats(0.1, 3), st.integers(0, 3)
    ),
    max_size=5,
)
needs = st.lists(st.builds(Need, st.uuids().map(str), st.floats(1, 100)), max_size=8)


@given(st.floats(1, 100), types)
def test_the_place_is_the_cheapest_that_fits_and_is_free(memory: float, given_types: list[NodeType]) -> None:
    need = Need("k", memory)
    kind = placement.place(need, given_types)
    fitting = [other for other in given_types if other.free and other.memory_gb >= memory]
    assert (kind is None) == (not fitting)
    if kind is not None:
        assert kind in fitting
        assert kind.price_of_work == min(other.price_of_work for other in fitting)
    if placement.fits_nowhere(need, given_types):
        assert kind is None


@given(needs, types)
def test_no_type_is_filled_over_and_nobody_waits_beside_room(
    given_needs: list[Need], given_types: list[NodeType]
) -> None:
    placed = placement.place_all(given_needs, given_types)
    left = {kind.name: kind.free - list(placed.values()).count(kind.name) for kind in given_types}
    assert all(free >= 0 for free in left.values())
    for need in given_needs:
        if need.name not in placed:
            assert not [kind for kind in given_types if left[kind.name] and kind.memory_gb >= need.memory_gb]


@given(needs, types, st.sets(st.integers(0, 4)))
def test_what_does_not_come_is_asked_for_on_behalf_of_what_fits_nothing_else(
    given_needs: list[Need], given_types: list[NodeType], places: set[int]
) -> None:
    absent = {kind.name for place, kind in enumerate(given_types) if place in places}
    asked = placement.ask_for(given_needs, given_types, absent)
    others = placement.place_all(given_needs, [kind for kind in given_types if kind.name not in absent])
    assert {name: kind for name, kind in asked.items() if kind not in absent} == others
    left = {kind.name: kind.free - list(asked.values()).count(kind.name) for kind in given_types}
    assert all(free >= 0 for free in left.values())
    for need in given_needs:
        if need.name not in asked:
            assert not [kind for kind in given_types if left[kind.name] and kind.memory_gb >= need.memory_gb]


def test_a_quick_machine_may_be_the_cheaper_one() -> None:
    slow, quick = NodeType("slow", 24, 0.30, 0.5, 1), NodeType("quick", 24, 0.50, 1.0, 1)
    assert placement.place(Need("k", 20), [slow, quick]) == quick
    assert placement.place_all([Need("a", 20), Need("b", 20), Need("c", 20)], [slow, quick]) == {
        "a": "quick",
        "b": "slow",
    }
    assert placement.fits_nowhere(Need("k", 40), [slow, quick])
