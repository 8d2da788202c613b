"""A training that hangs, or whose process is stopped, is found and ended; slow ones and pauses are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.execution.ray.event_mailbox import EventMailbox
from moedisco_ray.execution.ray.hang_watch import HangWatch
from moedisco_ray.execution.ray.mailbox_actor import MailboxActor
from moedisco_ray.execution.ray.pulse import BEAT_SECONDS, Pulse
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.hanging import LONG_SECONDS, SILENT_SECONDS, START_SECONDS, allowed_seconds
from moedisco_ray.policies.retrying import End


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def beats(pulse: Pulse, clock: Clock, seconds: float) -> None:
    """What the thread does while time passes."""
    end = clock.now + seconds
    while clock.now + BEAT_SECONDS <= end:
        clock.now += BEAT_SECONDS
        pulse.beat()
    clock.now = end


@pytest.fixture
def clock() -> Clock:
    return Clock()


def trained(clock: Clock, step_seconds: float, steps: int = 8) -> tuple[Pulse, list[float], list[float]]:
    """A process that has made some steps, what it has sent, and when it recorded its stacks."""
    sent, dumped = list[float](), list[float]()
    pulse = Pulse(sent.append, dump=lambda: dumped.append(clock.now), clock=clock)
    for step in range(steps):
        pulse.step(step)
        beats(pulse, clock, step_seconds)
        pulse.step(None)
    return pulse, sent, dumped


@pytest.mark.parametrize(("step_seconds", "allowed"), [(0.1, 120.0), (30.0, 600.0)])
def test_a_step_that_does_not_end_is_told_and_its_stacks_are_recorded_once(
    clock: Clock, step_seconds: float, allowed: float
) -> None:
    pulse, sent, dumped = trained(clock, step_seconds)
    pulse.step(8)
    beats(pulse, clock, allowed)
    assert not any(sent)
    assert not dumped
    beats(pulse, clock, 4 * BEAT_SECONDS)
    assert sent[-1] > allowed
    assert len(dumped) == 1


@pytest.mark.parametrize("steps", [0, 8])
def test_a_first_step_and_a_pause_may_take_an_hour(clock: Clock, steps: int) -> None:
    pulse, sent, _ = trained(clock, 0.1, steps)
    pulse.step(0 if not steps else None)
    beats(pulse, clock, LONG_SECONDS)
    assert not any(sent)
    beats(pulse, clock, 2 * BEAT_SECONDS)
    assert sent[-1] > LONG_SECONDS


def test_a_process_that_was_stopped_and_goes_on_does_not_hang(clock: Clock) -> None:
    pulse, sent, _ = trained(clock, 0.1)
    pulse.step(8)
    clock.now += 7200
    pulse.beat()
    beats(pulse, clock, 60)
    pulse.step(None)
    assert not any(sent)


@given(st.lists(st.floats(1e-3, 1e4), max_size=80), st.booleans(), st.booleans(), st.booleans())
def test_no_usual_step_counts_as_hung(durations: list[float], in_step: bool, compiles: bool, in_gang: bool) -> None:
    allowed = allowed_seconds(durations, in_step=in_step, compiles=compiles, in_gang=in_gang)
    assert allowed >= (600 if in_gang else 120)
    usual = sorted(durations)[: len(durations) // 2 + 1]
    assert not in_step or all(duration < allowed for duration in usual)


class Mail(EventMailbox):
    """One training, and the attempts at it that were killed."""

    def __init__(self, status: UnitStatus) -> None:
        self.told = status
        self.killed: list[str] = []

    def statuses(self, units: Sequence[str]) -> dict[str, UnitStatus]:
        return dict.fromkeys(units, self.told)

    def kill_attempt(self, unit: str) -> None:
        self.killed.append(unit)


def watched(clock: Clock, status: UnitStatus, seconds: float) -> Mail:
    """Check every second for some time."""
    mail = Mail(status)
    watch = HangWatch(mail, clock=clock)
    for _ in range(int(seconds)):
        clock.now += 1
        watch.check(["submodel-0"])
    return mail


def test_a_silent_process_is_killed_and_the_attempt_says_why(clock: Clock) -> None:
    held = UnitStatus(("node",), held_at=clock.now, pulse_at=clock.now)
    assert not watched(clock, held, SILENT_SECONDS).killed
    mail = Mail(held)
    watch = HangWatch(mail, clock=clock)
    for _ in range(int(SILENT_SECONDS) + 1):
        clock.now += 1
        watch.check(["submodel-0"])
    assert set(mail.killed) == {"submodel-0"}
    assert watch.end_of("submodel-0", End("out_of_memory", 7, "no room")).kind == "out_of_memory"
    watch.check(["submodel-0"])
    end = watch.end_of("submodel-0", End("failed", 7, "The actor died because it was killed by `ray.kill`."))
    assert (end.kind, end.step) == ("died", 7)
    assert "gave no sign of life" in end.reason
    assert watch.end_of("submodel-0", End("failed", 7, "another cause")).reason == "another cause"


def test_a_process_has_longer_until_its_first_sign_of_life_and_a_waiting_one_has_no_limit(clock: Clock) -> None:
    starting = UnitStatus(("node",), held_at=clock.now)
    assert not watched(clock, starting, START_SECONDS - 1).killed
    assert watched(clock, dataclasses.replace(starting, held_at=clock.now), START_SECONDS + 2).killed
    assert not watched(clock, UnitStatus(), 2 * START_SECONDS).killed


def test_a_driver_that_was_stopped_waits_for_messages_before_it_kills(clock: Clock) -> None:
    mail = Mail(UnitStatus(("node",), held_at=clock.now, pulse_at=clock.now))
    watch = HangWatch(mail, clock=clock)
    watch.check(["submodel-0"])
    clock.now += 7200
    watch.check(["submodel-0"])
    assert not mail.killed
    mail.told = dataclasses.replace(mail.told, pulse_at=clock.now + 5)
    for _ in range(100):
        clock.now += 1
        watch.check(["submodel-0"])
    assert not mail.killed


def test_the_next_attempt_is_not_judged_by_the_signs_of_the_last() -> None:
    mailbox = MailboxActor()
    attempt = mailbox.begin_attempt("submodel-0")
    mailbox.set_workers("submodel-0", attempt, ("node",))
    mailbox.beat("submodel-0", attempt, 150.0)
    mailbox.end_attempt("submodel-0")
    status = mailbox.statuses(["submodel-0"])["submodel-0"]
    assert (status.nodes, status.held_at, status.pulse_at, status.hung_seconds) == (("node",), None, None, 0.0)


def test_only_the_newest_attempt_gives_signs_of_life() -> None:
    mailbox = MailboxActor()
    first = mailbox.begin_attempt("submodel-0")
    mailbox.beat("submodel-0", first, 150.0)
    assert mailbox.statuses(["submodel-0"])["submodel-0"].hung_seconds == 150
    mailbox.begin_attempt("submodel-0")
    mailbox.beat("submodel-0", first, 160.0)
    status = mailbox.statuses(["submodel-0"])["submodel-0"]
    assert (status.pulse_at, status.hung_seconds) == (None, 0.0)
