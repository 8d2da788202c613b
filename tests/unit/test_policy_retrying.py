"""What follows an end: preemptions are free, failures are counted, bad batches are skipped once."""

from __future__ import annotations

import itertools
import random

import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.policies.retrying import (
    Again,
    End,
    EndKind,
    GiveUp,
    GoBack,
    History,
    Limits,
    Skip,
    decide,
    kind_of,
    window_of,
)

LIMITS = Limits(failures=3, same_step=2, window=10)
CHECKPOINTS = (70, 80, 90, 100)
FAILURES: tuple[EndKind, ...] = ("died", "failed", "storage", "not_finite", "out_of_memory")
kinds: st.SearchStrategy[EndKind] = st.sampled_from(["preempted", *FAILURES])


def ends_of(*kinds: EndKind) -> st.SearchStrategy[End]:
    # A loss that is not finite names its step; of the others it may not be known.
    return st.sampled_from(kinds).flatmap(
        lambda kind: st.builds(
            End,
            st.just(kind),
            st.integers(0, 200) | (st.nothing() if kind == "not_finite" else st.none()),
            st.just("why"),
        )
    )


def after(*given_ends: End, micro_batch: int = 8) -> Again | GoBack | GiveUp:
    decision: Again | GoBack | GiveUp = Again(History(micro_batch))
    for end in given_ends:
        assert not isinstance(decision, GiveUp)
        decision = decide(decision.history, end, CHECKPOINTS, LIMITS)
    return decision


def test_preemptions_are_never_counted() -> None:
    assert after(*[End("preempted", 5, "spot")] * 1000) == Again(History(8))


def test_failures_are_bounded() -> None:
    assert isinstance(after(*[End("failed", step, "bug") for step in (1, 2, 3)]), Again)
    decision = after(*[End("failed", step, "bug") for step in (1, 2, 3, 4)])
    assert decision == GiveUp("failed 4 times, the last at step 4: bug", diverged=False)


def test_a_loss_that_is_not_finite_goes_back_and_leaves_batches_out() -> None:
    decision = after(End("not_finite", 101, "nan"))
    assert decision == GoBack(History(8, skip=Skip(91, 21)), 90)


def test_failing_again_at_one_step_goes_back_even_with_a_preemption_between() -> None:
    decision = after(End("failed", 101, "bug"), End("preempted", 95, "spot"), End("failed", 101, "bug"))
    assert isinstance(decision, GoBack)


def test_dying_twice_near_one_step_does_not_go_back() -> None:
    assert isinstance(after(*[End("died", 101, "SIGKILL")] * 3), Again)
    assert isinstance(after(*[End("died", 101, "SIGKILL")] * 4), GiveUp)


@pytest.mark.parametrize(("kind", "what"), [("not_finite", "diverged"), ("failed", "failed")])
def test_needing_to_go_back_twice_is_the_end_and_says_why(kind: EndKind, what: str) -> None:
    decision = after(
        End("not_finite", 101, "nan"), *[End(kind, 150, "why")] * (LIMITS.same_step if kind == "failed" else 1)
    )
    assert decision == GiveUp(f"{what} at step 150 after it went back and skipped 21 batches: why", diverged=True)


def test_without_an_old_checkpoint_it_goes_back_to_the_oldest() -> None:
    assert decide(History(8), End("not_finite", 75, ""), (70, 80), LIMITS) == GoBack(History(8, skip=Skip(70, 16)), 70)
    assert decide(History(8), End("not_finite", 3, ""), (), LIMITS) == GoBack(History(8, skip=Skip(0, 14)), 0)


def test_what_fails_before_its_first_step_never_goes_back() -> None:
    end = End("failed", None, "the disk of a new driver's node hiccups")
    assert after(*[end] * 3) == Again(History(8, failures=3))
    assert after(*[end] * 4) == GiveUp(f"failed 4 times, the last before its first step: {end.reason}", diverged=False)


def test_what_was_last_heard_of_before_its_newest_checkpoint_goes_back_from_there() -> None:
    assert after(*[End("failed", 60, "bug")] * 2) == GoBack(History(8, skip=Skip(90, 21)), 90)


@given(
    st.lists(
        st.builds(
            End, kinds.filter(lambda kind: kind != "not_finite"), st.none() | st.integers(100, 101), st.just("why")
        )
    )
)
def test_only_failures_in_a_row_at_one_known_step_go_back(given_ends: list[End]) -> None:
    history, counted = History(64), list[End]()
    for end in given_ends:
        decision = decide(history, end, CHECKPOINTS, LIMITS)
        goes_back = False
        if end.kind in ("died", "failed", "storage"):
            counted.append(end)
            row = [(one.kind, one.step) for one in counted[-LIMITS.same_step :]]
            goes_back = end.step is not None and row == [("failed", end.step)] * LIMITS.same_step
        assert isinstance(decision, GoBack) == goes_back
        if not isinstance(decision, Again):
            return
        history = decision.history


def test_memory_is_halved_down_to_one_sequence() -> None:
    oom = End("out_of_memory", 0, "CUDA")
    assert after(oom, oom, oom) == Again(History(1))
    assert isinstance(after(oom, oom, oom, oom), GiveUp)
    assert after(oom, micro_batch=5) == Again(History(2))


@given(st.integers(1, 64), st.sampled_from([None, False, True]))
def test_halving_ends_at_one_sequence(micro_batch: int, recompute: bool | None) -> None:
    history = History(micro_batch, recompute=recompute)
    while True:
        decision = decide(history, End("out_of_memory", 0, ""), (), LIMITS)
        if isinstance(decision, GiveUp):
            assert history.micro_batch == 1
            assert history.recompute is not False
            return
        if history.micro_batch == 1:
            assert (history.recompute, decision.history.recompute) == (False, True)
        else:
            assert decision.history.micro_batch == history.micro_batch // 2
        history = decision.history


def test_a_training_that_went_back_recomputes_as_before() -> None:
    again = decide(History(1, recompute=True), End("not_finite", 95, "nan"), CHECKPOINTS, LIMITS)
    assert isinstance(again, GoBack)
    assert again.history.recompute is True


@settings(max_examples=examples(15, 100))
@given(
    st.lists(ends_of(*FAILURES), min_size=21, max_size=40),
    st.lists(ends_of("preempted"), max_size=30),
    st.randoms(use_true_random=False),
)
def test_whatever_happens_it_comes_to_an_end_and_goes_back_once(
    failures: list[End], preemptions: list[End], dice: random.Random
) -> None:
    given_ends = failures + preemptions
    dice.shuffle(given_ends)
    history, back, counted = History(8), 0, 0
    for end in given_ends:
        decision = decide(history, end, CHECKPOINTS, LIMITS)
        counted += end.kind in ("died", "failed", "not_finite")
        if isinstance(decision, GiveUp):
            break
        back += isinstance(decision, GoBack)
        history = decision.history
    assert isinstance(decision, GiveUp)
    assert back <= 1
    assert counted <= 2 * (LIMITS.failures + 1)


@given(st.integers(0, 300), st.lists(st.integers(0, 300), max_size=6), st.integers(1, 50))
def test_going_back_leaves_the_failed_batch_out_and_none_twice(step: int, checkpoints: list[int], window: int) -> None:
    decision = decide(History(8), End("not_finite", step, ""), checkpoints, Limits(window=window))
    assert isinstance(decision, GoBack)
    skip = decision.history.skip
    assert skip is not None
    assert decision.checkpoint in (0, *checkpoints)
    assert decision.checkpoint <= step
    batches = [skip.batch(s) for s in range(500)]
    assert step not in batches
    assert all(a < b for a, b in itertools.pairwise(batches))
    assert batches[: decision.checkpoint] == list(range(decision.checkpoint))  # what the checkpoint was trained on


def test_an_end_is_told_by_what_is_known_of_it() -> None:
    assert kind_of("ActorDiedError: the node died", node_lost=True) == "preempted"
    assert kind_of("ActorDiedError: SIGKILL", node_lost=False) == "failed"
    assert kind_of("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", node_lost=False) == "out_of_memory"
    assert kind_of("Task was killed due to the node running low on memory", node_lost=False) == "out_of_memory"
    assert kind_of("TrainingError: the loss is nan", node_lost=True, finite=False) == "not_finite"


def test_short_trainings_have_short_windows() -> None:
    assert [window_of(steps) for steps in (1, 40, 400, 2000, 10**6)] == [1, 2, 20, 100, 100]
