"""Trainings on slow machines move to free slots of other nodes, and only there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.config import LowMemoryPool, Optimizer, Pool
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import replacing as module
from moedisco_ray.execution.ray.event_mailbox import EventMailbox
from moedisco_ray.execution.ray.replacing import Replacements, RunningAttempt
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.moving import worth_moving
from moedisco_ray.training import TrainJob

LOW = LowMemoryPool()
NOTHING = UnitStatus()


class Mail(EventMailbox):
    def __init__(self, **statuses: UnitStatus) -> None:
        self.told = statuses
        self.events: list[Event] = []

    def statuses(self, units: Sequence[str]) -> dict[str, UnitStatus]:
        return {unit: self.told[unit] for unit in units}

    def push(self, event: Event) -> None:
        self.events.append(event)


class Cluster:
    """Slots by node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **slots: int) -> None:
        self.slots = slots
        self._directory = tmp_path
        monkeypatch.setattr(module.session, "room", self.room)

    def room(self, pool: Pool, aside: Collection[str] = ()) -> int:
        del pool
        return sum(slots for node, slots in self.slots.items() if node not in aside)

    def attempt(self, name: str, steps: int = 1000, before: UnitStatus = NOTHING) -> RunningAttempt:
        job = TrainJob(
            stage="submodels",
            name=name,
            model=self._directory,
            packed_dirs=(),
            output=self._directory / name,
            checkpoints=self._directory / name / "steps",
            steps=steps,
            sequence_length=1,
            optimizer=Optimizer(),
            checkpoint_every=10,
        )
        return RunningAttempt(job, LOW, 1, before, StopFile(self._directory / f"end-{name}"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    return Cluster(monkeypatch, tmp_path, slow=2, fast=2)


def trains(node: str, step_seconds: float, step: int = 50) -> UnitStatus:
    return UnitStatus((node,), step=step, step_seconds=step_seconds, start_seconds=10.0)


def test_a_slow_training_moves_to_a_free_slot_of_another_node(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    running = [cluster.attempt("a"), cluster.attempt("b")]
    replacements = Replacements(mail, None)
    replacements.end_slow(running, waiting=False, aside=())
    assert [(event.unit, event.data["kind"]) for event in mail.events] == [("a", "moved")]
    assert "a step takes 5 s on this node, and 0.5 s elsewhere" in mail.events[0].data["reason"]
    assert [each.end.requested for each in running] == [True, False]
    replacements.end_slow(running, waiting=False, aside=())
    assert len(mail.events) == 1
    assert replacements.avoided("a", LOW, running[1:], ()) == {"slow"}
    assert replacements.avoided("b", LOW, running[:1], ()) == set()


@pytest.mark.parametrize(
    ("slots", "waiting", "aside"),
    [
        ({"slow": 4, "fast": 1}, False, ()),
        ({"slow": 1, "fast": 9}, True, ()),
        ({"slow": 1, "fast": 9}, False, ["fast"]),
    ],
    ids=["no other slot is free", "others wait for slots", "the other node is put aside"],
)
def test_it_stays_if_no_other_slot_is_free_for_it(
    cluster: Cluster, slots: dict[str, int], waiting: bool, aside: list[str]
) -> None:
    cluster.slots = slots
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    Replacements(mail, None).end_slow([cluster.attempt("a"), cluster.attempt("b")], waiting=waiting, aside=aside)
    assert not mail.events


def test_speeds_of_an_earlier_attempt_and_of_a_training_alone_say_nothing(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    alone, again = cluster.attempt("a"), cluster.attempt("a", before=mail.told["a"])
    Replacements(mail, None).end_slow([alone], waiting=False, aside=())
    Replacements(mail, None).end_slow([again, cluster.attempt("b")], waiting=False, aside=())
    assert not mail.events


def test_a_training_that_ended_tells_what_is_usual(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 0.6, step=1), b=trains("fast", 0.5))
    replacements = Replacements(mail, None)
    replacements.end_slow([cluster.attempt("a"), cluster.attempt("b")], waiting=False, aside=())
    assert not mail.events
    mail.told["a"] = trains("slow", 5.0)
    replacements.end_slow([cluster.attempt("a")], waiting=False, aside=())
    assert [event.unit for event in mail.events] == ["a"]


def test_a_node_that_was_left_is_taken_again_if_no_other_has_room(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    running = [cluster.attempt("a"), cluster.attempt("b")]
    replacements = Replacements(mail, None)
    replacements.end_slow(running, waiting=False, aside=())
    cluster.slots = {"slow": 2, "fast": 1}
    assert replacements.avoided("a", LOW, running[1:], ()) == set()
    cluster.slots = {"slow": 2, "fast": 2}
    assert replacements.avoided("a", LOW, running[1:], ()) == set()


@given(st.integers(0, 10_000), st.floats(0.001, 100), st.floats(0.001, 100), st.floats(0, 1000))
def test_a_move_that_pays_would_pay_twice_over(steps: int, here: float, usual: float, restart: float) -> None:
    if worth_moving(steps, here, usual, restart):
        assert restart + steps * usual < steps * here / 2
        assert here > usual
