from __future__ import annotations

from typing import get_args

from driver_plan import LONGEST_DELAY, Stage, Target, draw
from hypothesis import given
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32)


@given(SEEDS)
def test_a_kill_comes_while_its_stage_is_under_way(seed: int) -> None:
    kill = draw(seed)
    if kill.trains:
        assert 0 < kill.share < 1
        assert kill.delay == 0
    else:
        assert 0 <= kill.delay <= LONGEST_DELAY
        assert kill.share == 0


@given(SEEDS)
def test_a_seed_always_draws_the_same_kill(seed: int) -> None:
    assert draw(seed) == draw(seed)


@given(st.integers(0, 2**30))
def test_four_seeds_in_a_row_kill_both_targets_in_a_directory_and_on_a_server(first: int) -> None:
    drawn = {(kill.target, kill.store == "disk") for kill in map(draw, range(first, first + 4))}
    assert drawn == {(target, on_disk) for target in get_args(Target) for on_disk in (True, False)}


def test_thirty_seeds_hold_every_stage_and_every_fault() -> None:
    drawn = [draw(seed) for seed in range(30)]
    assert {kill.stage for kill in drawn} == set(get_args(Stage))
    assert {(kill.target, "submodels") for kill in drawn} == {(target, "submodels") for target in get_args(Target)}
    assert {kill.store for kill in drawn} == {"disk", "throttle", "cut", "refuse", "slow"}
