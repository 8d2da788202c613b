from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.execution.sync_board import SyncBoard
from moedisco_ray.policies.sync_points import Arrival, Turn

NAMES = ("a", "b", "c")


def board_with(members: int, ranges: int) -> tuple[SyncBoard, list[float]]:
    now = [0.0]
    board = SyncBoard(lambda: now[0])
    for name in NAMES[:members]:
        board.arrive(Arrival(name, 1, 1, ()))
    board.open(ranges)
    return board, now


def combined(board: SyncBoard, place: int) -> None:
    board.finish(1, place, {f"common/{place}": Entry(1, "")})


@given(ranges=st.integers(1, 9), lost=st.sets(st.sampled_from(NAMES), max_size=2))
def test_members_that_stay_combine_every_range_whoever_is_lost(ranges: int, lost: set[str]) -> None:
    board, now = board_with(3, ranges)
    for name in lost:  # each takes a range and is never heard of again
        board.turn(name, 1)
    left = [name for name in NAMES if name not in lost]
    for step in range(1000):
        turn = board.turn(left[step % len(left)], 1)
        if turn.action == "combine":
            combined(board, turn.number)
        elif board.progress().combined == ranges:
            break
        now[0] += 1
    assert board.progress().combined == ranges
    assert len(board.files()) == ranges


def test_no_range_has_two_members_while_both_are_in_time() -> None:
    board, now = board_with(3, 3)
    assert [board.turn(name, 1) for name in NAMES] == [Turn("combine", place) for place in range(3)]
    now[0] = 2.0
    combined(board, 0)
    now[0] = 9.0
    assert board.turn("a", 1) == Turn("stay")
    now[0] = 11.0  # later than 10 s, and than three times what the first range took
    assert board.turn("a", 1) == Turn("combine", 1)


def test_a_member_that_comes_back_gets_its_range_again() -> None:
    board, _ = board_with(2, 3)
    assert board.turn("b", 1) == Turn("combine", 0)
    assert board.turn("b", 1) == Turn("combine", 0)
    combined(board, 0)
    assert board.turn("b", 1) == Turn("combine", 1)


def test_members_arrive_wait_and_load() -> None:
    board = SyncBoard()
    assert board.turn("a", 1) == Turn("arrive")
    board.arrive(Arrival("a", 2, 1, ()))  # another sync point than the next one
    assert board.turn("a", 1) == Turn("arrive")
    board.arrive(Arrival("a", 1, 1, ()))
    assert board.turn("a", 1) == Turn("wait")
    board.begin(1)
    assert board.turn("a", 1) == Turn("load", 1)
    assert board.turn("a", 2) == Turn("arrive")
