from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.domain.admission import ActiveRun, ClusterCapacity, PoolNeed, PoolRoom, QueuedRun, RunLimits, admit

LIMITS = RunLimits(runs=4, runs_per_owner=2)


def run(
    run_id: str, owner: str = "ann", low: str = "low", high: str = "high", gang: int = 1, held: str | None = None
) -> QueuedRun:
    return QueuedRun(run_id, owner, (PoolNeed((low,), slots=1, free=1), PoolNeed((high,), slots=gang, free=0)), held)


def cluster(low: float = 4, high: float = 4, *, grows: bool = False, **free: float) -> ClusterCapacity:
    return ClusterCapacity({"low": PoolRoom(low, free.get("low_free", low)), "high": PoolRoom(high, high)}, grows)


def reasons(*decided):
    return {each.run_id: each.reason for each in decided}


def test_runs_start_in_the_order_of_the_queue_up_to_the_limits():
    queue = [run("a"), run("b"), run("c"), run("d", "bob"), run("e", "eve"), run("f", "joe")]
    assert reasons(*admit(queue, [], LIMITS, cluster(low=9))) == {
        "a": None,
        "b": None,
        "c": "owner ann has 2 of 2 runs active",
        "d": None,
        "e": None,
        "f": "4 of 4 runs are active",
    }


def test_active_runs_count():
    active = [ActiveRun(owner, (("low",),)) for owner in ("ann", "ann", "bob", "eve")]
    assert reasons(*admit([run("a", "joe")], active, LIMITS, cluster(low=9)))["a"] == "4 of 4 runs are active"


def test_a_run_that_waits_for_its_owner_lets_others_pass_and_one_that_waits_for_a_slot_does_not():
    active = [ActiveRun("ann", ()), ActiveRun("ann", ())]
    decided = reasons(*admit([run("a"), run("b", "bob"), run("c", "eve")], active, LIMITS, cluster(low=1)))
    assert decided["a"] == "owner ann has 2 of 2 runs active"
    assert decided["b"] is None
    assert decided["c"] == "waits for 1 low: 0 of 1 are free"


def test_what_a_run_has_claimed_is_not_free_though_ray_has_not_seen_it_used():
    decided = admit([run("a"), run("b", "bob")], [ActiveRun("eve", (("low",),))], LIMITS, cluster(low=2))
    assert [each.start for each in decided] == [True, False]


def test_slots_that_others_use_are_not_free_though_no_run_of_ours_claims_them():
    [decided] = admit([run("a")], [], LIMITS, cluster(low=4, low_free=0))
    assert decided.reason == "waits for 1 low: 0 of 4 are free"


def test_one_free_slot_starts_one_run_where_others_use_the_rest():
    decided = admit([run("a"), run("b", "bob")], [], LIMITS, cluster(low=2, low_free=1))
    assert [each.start for each in decided] == [True, False]


def test_workers_that_already_wait_are_reported():
    rooms = ClusterCapacity({"low": PoolRoom(4, 0, pending=2), "high": PoolRoom(1, 1)})
    [decided] = admit([run("a")], [], LIMITS, rooms)
    assert decided.reason == "waits for 1 low: 0 of 4 are free; 2 workers already wait"


def test_a_run_that_waits_for_an_empty_pool_does_not_block_others():
    decided = reasons(*admit([run("a", low="rare"), run("b", "bob")], [], LIMITS, cluster()))
    assert decided == {"a": "no node offers rare", "b": None}


def test_a_gang_larger_than_the_cluster_waits_for_machines():
    [decided] = admit([run("a", gang=8)], [], LIMITS, cluster(high=4))
    assert decided.reason == "needs 8 high at once; the nodes offer 4"


def test_an_autoscaler_may_bring_what_is_missing():
    queue = [run("a", low="rare"), run("b", gang=99), run("c", "bob")]
    assert all(each.start for each in admit(queue, [], LIMITS, cluster(low=0, grows=True)))


def test_one_tag_for_both_pools_will_do():
    [decided] = admit([run("a", high="low", gang=2)], [], LIMITS, ClusterCapacity({"low": PoolRoom(2, 1)}))
    assert decided.start


def test_without_ray_nothing_starts():
    assert reasons(*admit([run("a")], [], LIMITS, None)) == {"a": "Ray does not answer"}


def test_a_run_that_is_held_says_why():
    assert reasons(*admit([run("a", held="its budget is spent"), run("b")], [], LIMITS, cluster())) == {
        "a": "its budget is spent",
        "b": None,
    }


RUNS = st.builds(
    run,
    st.uuids().map(str),
    st.sampled_from(["ann", "bob", "eve"]),
    st.sampled_from(["low", "rare", "high"]),
    gang=st.integers(1, 4),
    held=st.sampled_from([None, None, "held"]),
)
ACTIVE = st.builds(
    ActiveRun, st.sampled_from(["ann", "bob", "eve"]), st.sampled_from([(), (("low",),), (("rare",),), (("high",),)])
)
ROOMS = st.builds(lambda slots, used: PoolRoom(slots, max(0, slots - used)), st.integers(0, 4), st.integers(0, 4))
CLUSTERS = st.builds(ClusterCapacity, st.dictionaries(st.sampled_from(["low", "rare", "high"]), ROOMS), st.booleans())


@given(
    st.lists(RUNS, max_size=12),
    st.lists(ACTIVE, max_size=5),
    st.integers(1, 5),
    st.integers(1, 3),
    st.none() | CLUSTERS,
)
def test_no_limit_is_passed_and_every_run_is_answered(queue, active, most, per_owner, there):
    decided = admit(queue, active, RunLimits(most, per_owner), there)
    assert [each.run_id for each in decided] == [each.run_id for each in queue]
    assert all(each.start == (each.reason is None) for each in decided)
    started = [each for each, answer in zip(queue, decided, strict=True) if answer.start]
    assert not started or len(started) + len(active) <= most
    for owner in {each.owner for each in started}:
        assert sum(each.owner == owner for each in (*started, *active)) <= per_owner
    if there is not None and not there.grows:
        for tag, room in there.rooms.items():
            assert sum(each.needs[0].resources == (tag,) for each in started) <= room.free


@given(st.lists(RUNS, max_size=12), CLUSTERS)
def test_a_run_that_waits_for_a_slot_is_not_overtaken(queue, there):
    """A later run starts only in another pool."""
    waiting: set[tuple[str, ...]] = set()
    for each, answer in zip(queue, admit(queue, [], RunLimits(99, 99), there), strict=True):
        assert not (answer.start and each.needs[0].resources in waiting)
        if answer.reason is not None and answer.reason.startswith("waits for"):
            waiting.add(each.needs[0].resources)


@given(st.lists(RUNS, min_size=1, max_size=12), CLUSTERS)
def test_an_idle_cluster_never_leaves_a_run_waiting_that_it_could_carry(queue, there):
    idle = ClusterCapacity({tag: PoolRoom(room.slots, room.slots) for tag, room in there.rooms.items()}, there.grows)
    decided = admit(queue, [], RunLimits(99, 99), idle)

    def could_start(run):
        fits = idle.grows or all(idle.room(need.resources).slots >= need.slots for need in run.needs)
        return run.held is None and fits

    assert any(each.start for each in decided) == any(map(could_start, queue))


def test_a_mixed_pool_has_the_room_of_all_its_types():
    mixed = PoolNeed(("t4", "l4"), slots=1, free=1)
    there = ClusterCapacity({"t4": PoolRoom(1, 1), "l4": PoolRoom(1, 1), "high": PoolRoom(1, 1)})
    queue = [QueuedRun(name, name, (mixed, PoolNeed(("high",), slots=1, free=0))) for name in "abc"]
    assert reasons(*admit(queue, [], LIMITS, there)) == {
        "a": None,
        "b": None,
        "c": "waits for 1 t4 or l4: 0 of 2 are free",
    }
    # Whoever holds a slot of one of the types leaves the others.
    assert [each.start for each in admit(queue, [ActiveRun("eve", (("l4",),))], LIMITS, there)] == [True, False, False]
    assert (
        admit(queue[:1], [], LIMITS, ClusterCapacity({"high": PoolRoom(1, 1)}))[0].reason == "no node offers t4 or l4"
    )
