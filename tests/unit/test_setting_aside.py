"""Cards on which trainings fail again and again, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import nodes_aside
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.policies.retrying import End
from moedisco_ray.policies.setting_aside import FAILURES, FIRST_SECONDS, MOST_SECONDS, Place, Record, after_failure

GPUS, CPUS = LowMemoryPool(gpu=1, max_workers=9), LowMemoryPool(max_workers=9)


@given(st.lists(st.integers(0, 100_000), min_size=FAILURES + 1, max_size=12))
def test_each_time_lasts_longer_than_the_one_before_up_to_a_limit(waits: Sequence[int]) -> None:
    record, now, seconds = Record(), 0.0, [0.0]
    for number, wait in enumerate(waits):
        now += wait
        record = after_failure(record, "unit", now)
        assert (record.until > now) == (number + 1 >= FAILURES)
        if record.times:
            seconds.append(record.until - now)
    assert seconds[1] == FIRST_SECONDS
    assert seconds == sorted(seconds)
    assert seconds[-1] <= MOST_SECONDS


class Cluster:
    """Nodes with slots, and what a run leaves out there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: dict[str, int]) -> None:
        self.now = 0.0
        self.aside = NodesAside(lambda: self.now)
        self.warnings: list[str] = []
        nodes: list[dict[str, Any]] = [
            {
                "NodeID": node,
                "NodeManagerAddress": f"10.0.0.{number}",
                "Alive": True,
                "Resources": {"low_mem_gpu": count, "GPU": count},
                "Labels": {},
            }
            for number, (node, count) in enumerate(slots.items())
        ]
        for module in (nodes_aside.ray, nodes_aside.session.ray):
            monkeypatch.setattr(module, "nodes", lambda: nodes)
        monkeypatch.setattr(nodes_aside.session.ray_internals, "draining_nodes", dict)

    def fails(self, pool: LowMemoryPool, place: Place, step: int | None = None, unit: str = "unit") -> bool:
        return self.aside.training_failed(pool, place, unit, End("failed", step, "CUDA error: ECC"), self._warn)

    def _warn(self, event: Event) -> None:
        self.warnings.append(event.data["message"])


def test_two_failures_put_a_card_aside_and_the_others_of_its_node_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: failures counted against the training alone, which met the same card until it had no attempt left."""
    cluster, bad = Cluster(monkeypatch, {"a": 2, "b": 1}), Place("a", "1")
    assert not cluster.fails(GPUS, bad)
    assert not cluster.fails(GPUS, Place("a", "0"))  # of another card, counted for itself
    assert (cluster.aside.room(GPUS), cluster.warnings) == (3, [])
    assert cluster.fails(GPUS, bad)
    [warning] = cluster.warnings
    assert "failed 2 times in a row on card 1 of node 10.0.0.0, at last with: CUDA error: ECC; " in warning
    assert warning.endswith("the run leaves it out for 10 minutes")
    assert (cluster.aside.room(GPUS), cluster.aside.of(GPUS)) == (2, frozenset())
    assert cluster.aside.has(GPUS, bad)
    assert not cluster.aside.has(GPUS, Place("a", "0"))
    assert cluster.fails(GPUS, Place("a", "0"))
    assert cluster.aside.of(GPUS) == {"a"}  # none of its cards is left
    assert cluster.aside.room(GPUS) == 1
    assert cluster.aside.room(CPUS) == 3
    cluster.now = FIRST_SECONDS + 1
    assert (cluster.aside.room(GPUS), cluster.aside.of(GPUS)) == (3, frozenset())


def test_a_card_is_not_left_out_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {"a": 2})
    for _ in range(3):
        assert not cluster.fails(CPUS, Place("a"))  # a node without cards counts as one
    assert cluster.aside.room(CPUS) == 2
    assert not cluster.fails(GPUS, Place("a", "0"))
    assert cluster.fails(GPUS, Place("a", "0"))
    assert [cluster.fails(GPUS, Place("a", "1")) for _ in range(2)] == [False, False]
    assert cluster.aside.room(GPUS) == 2  # a card that sometimes works is better than none


def test_the_cards_of_a_training_on_all_of_them_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: as one, so that the only machine was left out."""
    box = Place("a", "0,1,2,3")
    alone = Cluster(monkeypatch, {"a": 4})
    assert [alone.fails(GPUS, box) for _ in range(3)] == [False] * 3
    with_other = Cluster(monkeypatch, {"a": 4, "b": 4})
    assert [with_other.fails(GPUS, box) for _ in range(2)] == [False, True]
    assert (with_other.aside.room(GPUS), with_other.aside.of(GPUS)) == (4, {"a"})
    assert with_other.aside.has(GPUS, Place("a", "2"))  # one of them is the broken one
    assert not with_other.aside.has(GPUS, Place("b", "2"))


def test_a_training_that_finishes_clears_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, place = Cluster(monkeypatch, {"a": 1, "b": 1}), Place("a", "0")
    for _ in range(3):
        assert not cluster.fails(GPUS, place)
        cluster.aside.training_finished(place)
    assert not cluster.fails(GPUS, place)
    assert cluster.fails(GPUS, place)


def test_a_training_that_fails_at_the_same_step_everywhere_puts_no_card_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: its error left out one card after the other, for ten minutes and more, until one was left."""
    cluster = Cluster(monkeypatch, {"a": 1, "b": 1, "c": 1})
    first, second, third = (Place(node, "0") for node in "abc")
    assert not cluster.fails(GPUS, first, 7)
    assert cluster.fails(GPUS, first, 7)  # as it looks so far
    assert not cluster.fails(GPUS, second, 7)
    assert cluster.aside.room(GPUS) == 3
    assert not cluster.fails(GPUS, third, 7)
    assert not cluster.fails(GPUS, first, 7)
    assert not cluster.fails(GPUS, second, 8)
    assert cluster.fails(GPUS, second, 9)  # not at one step, but on one card


def test_trainings_that_a_broken_machine_ends_at_their_first_step_put_its_cards_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each begins again at the same step, on another card of the machine. Before: they cleared the cards for ever."""
    cluster = Cluster(monkeypatch, {"a": 2, "b": 2})
    first, second = (Place("a", card) for card in "01")
    found = [
        cluster.fails(GPUS, place, step, unit)
        for place, step, unit in (
            (first, 7, "x"), (second, 9, "y"), (second, 7, "x"), (first, 9, "y"), (first, 7, "x"),
        )
    ]  # fmt: skip
    assert found[:2] == [False, False]
    assert cluster.aside.of(GPUS) == {"a"}


def test_one_training_does_not_clear_a_card_that_others_failed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {"a": 1, "b": 1, "c": 1})
    bad = Place("a", "0")
    assert [cluster.fails(GPUS, bad, step, unit) for step, unit in ((20, "y"), (7, "x"))] == [False, True]
    assert not cluster.fails(GPUS, Place("b", "0"), 7, "x")
    assert cluster.aside.has(GPUS, bad)
