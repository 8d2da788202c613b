"""When workers ask each other, with the other workers made up; real ones are in `test_training_distributed`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.training import consensus
from moedisco_ray.training.consensus import Consensus, steps_between
from moedisco_ray.training.job import World

NOTICE = 30.0
"""Seconds that the shortest notice leaves."""


class Gang:
    """A worker that steps so quickly, and another that steps at its own pace and may say yes to the first question."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mine: float, other: float) -> None:
        self.now = 0.0
        self.mine = mine
        self.other = other
        self.other_says = False
        self.asked: list[int] = []
        self.step = 0
        monkeypatch.setattr(consensus.dist, "all_reduce", self._all_reduce)

    def steps(self, agree: Callable[[], list[bool]], count: int) -> list[list[bool]]:
        answers = []
        for _ in range(count):
            self.step += 1
            self.now += self.mine
            answers.append(agree())
        return answers

    def _all_reduce(self, values: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        self.asked.append(self.step)
        values.copy_(torch.maximum(values, torch.tensor([float(self.other_says), 0.0, self.other])))


@pytest.mark.parametrize(
    ("mine", "other", "asked"),
    [
        (4.0, 1.0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (0.5, 0.1, [1, 5, 9]),
        (0.5, 1.0, [1, 3, 5, 7, 9]),
        (0.001, 0.001, [1]),
    ],
)
def test_the_slowest_worker_s_steps_say_when_the_next_question_is(
    monkeypatch: pytest.MonkeyPatch, mine: float, other: float, asked: list[int]
) -> None:
    gang = Gang(monkeypatch, mine, other)
    gang.steps(Consensus((lambda: False, lambda: False), World(0, 2), lambda: gang.now), 10)
    assert gang.asked == asked  # one collective each, and none in between


def test_after_a_slow_first_step_it_asks_as_seldom_as_the_others_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    gang = Gang(monkeypatch, 20.0, 0.0)
    agree = Consensus((lambda: False, lambda: False), World(0, 2), lambda: gang.now)
    gang.steps(agree, 1)
    gang.mine = 0.25
    gang.steps(agree, 17)
    assert gang.asked == [1, 2, 10, 18]


def test_what_another_worker_says_is_what_this_one_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    gang = Gang(monkeypatch, 0.5, 0.5)
    agree = Consensus((lambda: False, lambda: True), World(1, 2), lambda: gang.now)
    assert gang.steps(agree, 2) == [[False, True], [False, False]]
    gang.other_says = True
    assert gang.steps(agree, 3) == [[False, False], [False, False], [True, True]]


def test_who_is_alone_asks_after_every_step() -> None:
    said = iter([False, True, False])
    agree = Consensus((lambda: next(said),), World())
    assert [agree() for _ in range(3)] == [[False], [True], [False]]


@given(st.floats(0, 1e6))
def test_a_question_comes_soon_enough_for_a_notice_wherever_a_step_does(step_seconds: float) -> None:
    steps = steps_between(step_seconds)
    assert steps >= 1
    assert steps == 1 or steps * step_seconds <= NOTICE / 10
