"""Trainings on slow machines move to free slots of other nodes, and only there."""

from __future__ import annotations

import dataclasses
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
        self.directory = tmp_path
        monkeypatch.setattr(module.session, "room", self.room)
        monkeypatch.setattr(module.session, "free_workers", lambda _bundle, aside=(): self.room(LOW, aside))

    def room(self, pool: Pool, aside: Collection[str] = ()) -> int:
        del pool
        return sum(slots for node, slots in self.slots.items() if node not in aside)

    def attempt(self, name: str, steps: int = 1000, before: UnitStatus = NOTHING) -> RunningAttempt:
        job = TrainJob(
            stage="submodels",
            name=name,
            model=self.directory,
            packed_dirs=(),
            output=self.directory / name,
            checkpoints=self.directory / name / "steps",
            steps=steps,
            sequence_length=1,
            optimizer=Optimizer(),
            checkpoint_every=10,
        )
        return RunningAttempt(job, LOW, 1, before, StopFile(self.directory / f"end-{name}"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    return Cluster(monkeypatch, tmp_path, slow=2, fast=2)


def trains(node: str, step_seconds: float, reports: int = 5) -> UnitStatus:
    return UnitStatus((node,), step=10 * reports, step_seconds=step_seconds, start_seconds=10.0, reports=reports)


def end_slow(replacements: Replacements, mail: Mail, running: Sequence[RunningAttempt], **options: object) -> None:
    """After the last reports, and after a further one of each training."""
    given = {"waiting": False, "aside": (), **options}
    replacements.end_slow(running, **given)
    for name, status in mail.told.items():
        mail.told[name] = dataclasses.replace(status, step=status.step + 10, reports=status.reports + 1)
    replacements.end_slow(running, **given)


def test_a_slow_training_moves_to_a_free_slot_of_another_node(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    running = [cluster.attempt("a"), cluster.attempt("b")]
    replacements = Replacements(mail, None)
    end_slow(replacements, mail, running)
    assert [(event.unit, event.data["kind"]) for event in mail.events] == [("a", "moved")]
    assert "a step takes 5 s on this node, and 0.5 s elsewhere" in mail.events[0].data["reason"]
    assert [each.end.requested for each in running] == [True, False]
    end_slow(replacements, mail, running)
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
    running = [cluster.attempt("a"), cluster.attempt("b")]
    end_slow(Replacements(mail, None), mail, running, waiting=waiting, aside=aside)
    assert not mail.events


def test_speeds_of_an_earlier_attempt_and_of_a_training_alone_say_nothing(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    end_slow(Replacements(mail, None), mail, [cluster.attempt("a")])
    again = cluster.attempt("a", before=mail.told["a"])
    Replacements(mail, None).end_slow([again, cluster.attempt("b")], waiting=False, aside=())
    assert not mail.events


def test_a_training_that_ended_tells_what_is_usual(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 0.6), b=trains("fast", 0.5))
    replacements = Replacements(mail, None)
    end_slow(replacements, mail, [cluster.attempt("a"), cluster.attempt("b")])
    assert not mail.events
    mail.told["a"] = trains("slow", 5.0)
    end_slow(replacements, mail, [cluster.attempt("a")])
    assert [event.unit for event in mail.events] == ["a"]


def test_the_first_report_of_a_process_and_one_slow_interval_are_no_reason(cluster: Cluster) -> None:
    """A process starts slowly: CUDA, kernels and the compiler are in its first interval."""
    mail = Mail(a=trains("slow", 5.0, reports=1), b=trains("fast", 0.5))
    running, replacements = [cluster.attempt("a"), cluster.attempt("b")], Replacements(mail, None)
    replacements.end_slow(running, waiting=False, aside=())
    for reports, seconds in ((2, 0.5), (3, 5.0), (4, 0.5), (5, 5.0), (6, 0.5)):
        mail.told["a"] = trains("slow", seconds, reports)
        replacements.end_slow(running, waiting=False, aside=())
    assert not mail.events


def test_a_training_moves_once(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    replacements = Replacements(mail, None)
    end_slow(replacements, mail, [cluster.attempt("a"), cluster.attempt("b")])
    again = dataclasses.replace(cluster.attempt("a"), end=StopFile(cluster.directory / "end-again"))
    mail.told["a"] = trains("other", 5.0)
    end_slow(replacements, mail, [again, cluster.attempt("b")])
    assert len(mail.events) == 1


def test_a_node_that_was_left_is_taken_again_if_no_other_has_room(cluster: Cluster) -> None:
    mail = Mail(a=trains("slow", 5.0), b=trains("fast", 0.5))
    running = [cluster.attempt("a"), cluster.attempt("b")]
    replacements = Replacements(mail, None)
    end_slow(replacements, mail, running)
    cluster.slots = {"slow": 2, "fast": 1}
    assert replacements.avoided("a", LOW, running[1:], ()) == set()


@given(st.integers(0, 10_000), st.floats(0.001, 100), st.floats(0.001, 100), st.floats(0, 1000))
def test_a_move_that_pays_would_pay_twice_over(steps: int, here: float, usual: float, restart: float) -> None:
    if worth_moving(steps, here, usual, restart):
        assert restart + steps * usual < steps * here / 2
        assert here > usual
