from __future__ import annotations

from itertools import pairwise
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st
from pool_plan import MOST_CHANGES, NODES, Kind, draw

from moedisco_ray.core.config import Checkpoint

SEEDS = st.integers(0, 2**32)


@given(SEEDS)
def test_a_pool_is_never_left_without_a_node(seed: int) -> None:
    nodes = dict(NODES)
    for change in draw(seed):
        nodes[change.stage] = change.nodes_after(nodes[change.stage])
        assert nodes[change.stage] >= 1
        assert change.absence is None or 0 <= change.absence < 10


@given(SEEDS)
def test_changes_come_in_the_order_in_which_a_run_gets_to_them(seed: int) -> None:
    plan = draw(seed)
    assert 1 <= len(plan) <= MOST_CHANGES
    order = list(NODES)
    for earlier, later in pairwise(plan):
        assert (order.index(earlier.stage), earlier.share) <= (order.index(later.stage), later.share)
    assert all(0 < change.share < 1 for change in plan)


@given(SEEDS)
def test_no_more_processes_are_killed_than_are_put_up_with(seed: int) -> None:
    for stage in ("submodels", "finetune"):
        assert (
            sum(change.kind == "process" and change.stage == stage for change in draw(seed))
            <= Checkpoint().max_failures
        )


@given(SEEDS)
def test_a_seed_always_draws_the_same_plan(seed: int) -> None:
    assert draw(seed) == draw(seed)


def test_thirty_seeds_hold_every_kind_of_change_in_both_pools() -> None:
    drawn = {(change.stage, change.kind) for seed in range(30) for change in draw(seed)}
    expected = {("submodels", kind) for kind in get_args(Kind)}
    assert drawn >= expected | {("finetune", kind) for kind in ("power", "notice", "process")}
